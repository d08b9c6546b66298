"""The text of a run, as tokens: read before any model is loaded, so that what is wrong with it is known at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flapkit.conversations import renderer
from flapkit.recipe import Calibration, Perplexity, Recipe, Text
from flapkit.stages.target import Target
from flapkit.text import TextSource
from flapkit.windows import Windows, cut_windows, draw_windows, encode


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """Windows to measure the perplexity of, and how.

    Args:
        asked: the recipe's entry.
        windows: the text.
    """

    asked: Perplexity
    windows: Windows


@dataclass(frozen=True, slots=True)
class RunText:
    """All text of a run.

    Args:
        calibration: tokens [windows, tokens].
        batch_size: calibration windows that go through the model at once.
        evaluations: name -> what perplexity is measured of, in the recipe's order.
    """

    calibration: Tensor
    batch_size: int
    evaluations: Mapping[str, EvaluationText] = field(default_factory=dict)


def read_text(recipe: Recipe, target: Target, tokenizer: PreTrainedTokenizerBase) -> RunText:
    """Read the calibration text and every evaluation text of a recipe.

    Raises:
        DataError: a text that cannot be read or is too short, or a tokenizer that does not fit the model.
    """
    evaluations = {
        name: EvaluationText(asked, evaluation_windows(asked, target, tokenizer))
        for name, asked in name_evaluations(recipe.evaluate.perplexity).items()
    }
    calibration = calibration_windows(recipe.calibration, target, tokenizer)
    return RunText(calibration, recipe.calibration.batch_size, evaluations)


def calibration_windows(asked: Calibration, target: Target, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Draw the calibration windows of a recipe, [windows, tokens]."""
    source = source_of(asked)
    return draw_windows(
        tokenizer,
        source.documents("calibration", renderer(target.adapter, tokenizer)),
        source.separator("calibration"),
        samples=asked.samples,
        length=asked.length,
        seed=asked.seed,
        vocab_size=target.config.vocab_size,
    )


def evaluation_windows(asked: Perplexity, target: Target, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Cut the windows of one evaluation."""
    source = source_of(asked)
    documents = source.documents("evaluation", renderer(target.adapter, tokenizer))
    tokens = encode(tokenizer, documents, source.separator("evaluation") or "\n\n", target.config.vocab_size)
    return cut_windows(tokens, asked.length, asked.stride, asked.windows)


def source_of(text: Text) -> TextSource:
    """Say where a recipe's text comes from."""
    return TextSource(text.dataset, text.subset, text.split, text.field)


def name_evaluations(texts: Sequence[Perplexity]) -> dict[str, Perplexity]:
    """Name evaluations by what they are, and number those that would be called the same."""
    names: dict[str, Perplexity] = {}
    for text in texts:
        name = f"{text.dataset}{f' {text.split}' if text.split else ''}, {text.length} tokens"
        name += f", stride {text.stride}" if text.stride else ""
        same = sum(known.split(" #")[0] == name for known in names)
        names[f"{name} #{same + 1}" if same else name] = text
    return names
