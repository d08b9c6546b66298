"""The text of a run, as tokens; it is read before any model is loaded, so that problems show early."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from flapkit.evaluation.protocol import EvaluationText, cut_text
from flapkit.execution.runtime import Runtime
from flapkit.execution.training import RecoveryText, windows_per_step
from flapkit.model.adapter import ArchitectureAdapter
from flapkit.pruning.recovery import Training, hold_out
from flapkit.recipe.schema import Calibration, Perplexity, Recipe
from flapkit.run.target import Target
from flapkit.system.errors import DataError, RecipeError
from flapkit.system.paths import name_only
from flapkit.text.conversations import Conversation
from flapkit.text.overlap import NOTEWORTHY, Overlap, find_overlap
from flapkit.text.source import Render, TextSource
from flapkit.text.windows import draw_windows, encode_measured

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunText:
    """All text of a run.

    Args:
        calibration: tokens [windows, tokens].
        batch_size: calibration windows that go through the model at once.
        evaluations: name -> evaluation text, in the recipe's order.
    """

    calibration: Tensor
    batch_size: int
    evaluations: Mapping[str, EvaluationText] = field(default_factory=dict)


def read_text(recipe: Recipe, target: Target, tokenizer: PreTrainedTokenizerBase) -> RunText:
    """Read the calibration text and every evaluation text of a recipe.

    Raises:
        DataError: a text cannot be read or is too short, or the tokenizer does not fit the model.
    """
    render = renderer(target.adapter, tokenizer)
    evaluations = read_evaluations(recipe.evaluate.perplexity, tokenizer, render, target.config.vocab_size)
    calibration = calibration_windows(recipe.calibration, target, tokenizer)
    compared = {
        name: replace(text, overlap=warn_of_overlap(name, text, calibration, "calibration"))
        for name, text in evaluations.items()
    }
    return RunText(calibration, recipe.calibration.batch_size, compared)


def read_evaluations(
    texts: Sequence[Perplexity], tokenizer: PreTrainedTokenizerBase, render: Render | None, vocab_size: int
) -> dict[str, EvaluationText]:
    """Read evaluation texts, by their names.

    Args:
        texts: the recipe's entries.
        tokenizer: the model's tokenizer.
        render: converts a conversation to text; None if conversations are not supported.
        vocab_size: the model's.

    Raises:
        DataError: a text cannot be read or is too short, or the tokenizer does not fit the model.
    """
    return {
        name: _evaluation(settings, tokenizer, render, vocab_size) for name, settings in name_evaluations(texts).items()
    }


def _evaluation(
    settings: Perplexity, tokenizer: PreTrainedTokenizerBase, render: Render | None, vocab_size: int
) -> EvaluationText:
    documents = settings.documents("evaluation", render)
    text = encode_measured(tokenizer, documents, settings.separator("evaluation") or "\n\n", vocab_size)
    cut = cut_text(text, settings.length, settings.stride, settings.windows, bos=tokenizer.bos_token_id)
    return EvaluationText(*cut, settings.batch_size)


def warn_of_overlap(name: str, text: EvaluationText, seen: Tensor, purpose: str) -> Overlap:
    """Find the overlap of an evaluation text with calibration or training windows, and warn if it is large.

    Args:
        name: name of the evaluation.
        text: the evaluation text.
        seen: tokens of the other windows [windows, tokens].
        purpose: their purpose, ``calibration`` or ``recovery``.
    """
    overlap = find_overlap(seen, text.windows)
    if overlap.share >= NOTEWORTHY:
        log.warning(
            "%s: %.1f %% of its scored tokens lie in rows of %d tokens that the %s text holds as well, "
            "which flatters its perplexity",
            name,
            100 * overlap.share,
            overlap.ngram,
            purpose,
        )
    return overlap


def calibration_windows(settings: Calibration, target: Target, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Draw the calibration windows of a recipe, [windows, tokens]."""
    return draw_windows(
        tokenizer,
        settings.documents("calibration", renderer(target.adapter, tokenizer)),
        settings.separator("calibration"),
        samples=settings.samples,
        length=settings.length,
        seed=settings.seed,
        vocab_size=target.config.vocab_size,
    )


def recovery_source(training: Training, recipe: Recipe) -> TextSource:
    """Return the source of a recovery's training text.

    Raises:
        RecipeError: training or validation text is evaluated as well, which would make the figure meaningless.
    """
    source = training.source(recipe.calibration)
    for used, purpose in ((source, "train"), (training.validation, "validate")):
        for evaluation in recipe.evaluate.perplexity:
            if used is not None and used.shares_text(evaluation):
                raise RecipeError(
                    f"compensator: the recovery would {purpose} on {used.dataset}, and `evaluate` measures the "
                    "perplexity of the same text; choose other text for one of them"
                )
    return source


def name_evaluations(texts: Sequence[Perplexity]) -> dict[str, Perplexity]:
    """Name evaluations by their settings, and number those with equal names."""
    names: dict[str, Perplexity] = {}
    for text in texts:
        name = f"{name_only(text.dataset)}{f' {text.split}' if text.split else ''}, {text.length} tokens"
        name += f", stride {text.stride}" if text.stride else ""
        same = sum(known.split(" #")[0] == name for known in names)
        names[f"{name} #{same + 1}" if same else name] = text
    return names


def renderer(
    adapter: ArchitectureAdapter | None, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Conversation], str] | None:
    """Choose how conversations are converted to text: by the adapter, otherwise by the tokenizer's chat template.

    A rendered conversation starts with the tokenizer's start token, if it has one, as in training.

    Args:
        adapter: the model's adapter, whose ``render`` has precedence.
        tokenizer: the model's tokenizer.

    Returns:
        A function that raises ``DataError`` for a conversation that the format does not allow; None if neither the
        adapter nor the tokenizer has a format.
    """
    adapted = adapter is not None and type(adapter).render is not ArchitectureAdapter.render
    if not adapted and not tokenizer.chat_template:
        return None

    def render(conversation: Conversation) -> str:
        text = adapter.render(conversation) if adapter else None
        if text is not None:
            start = tokenizer.bos_token or ""
            return text if text.startswith(start) else start + text
        return _by_template(tokenizer, conversation)

    return render


def _by_template(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    if not tokenizer.chat_template:
        raise DataError("the adapter does not render this conversation, and the tokenizer has no chat template")
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in conversation], tokenize=False))
    except Exception as error:
        raise DataError(f"the tokenizer's chat template fails on it: {type(error).__name__}: {error}") from error


def read_recovery_text(
    training: Training, source: TextSource, target: Target, tokenizer: PreTrainedTokenizerBase, runtime: Runtime
) -> RecoveryText:
    """Draw the windows of a recovery: as many as its steps need; validation windows are a multiple of the devices.

    Args:
        training: the number and length of the windows, and the seed.
        source: the training text.
        target: the model.
        tokenizer: the model's tokenizer.
        runtime: what the recovery runs on.

    Raises:
        DataError: a text cannot be read or is too short, or the tokenizer does not fit the model.
    """
    render = renderer(target.adapter, tokenizer)
    documents, held_out = hold_out(source.documents("calibration", render))
    separator, held_out_separator = (source.separator("calibration"),) * 2
    if training.validation is not None:
        documents = source.documents("calibration", render)
        held_out = training.validation.documents("calibration", render)
        held_out_separator = training.validation.separator("calibration")

    def draw(texts: Sequence[str], between: str | None, samples: int) -> Tensor:
        vocabulary = target.config.vocab_size
        return draw_windows(
            tokenizer,
            texts,
            between,
            samples=samples,
            length=training.length,
            seed=training.seed,
            vocab_size=vocabulary,
        )

    windows = training.steps * windows_per_step(training, runtime)
    validation = runtime.processes * math.ceil(training.validation_windows / runtime.processes)
    return RecoveryText(draw(documents, separator, windows), draw(held_out, held_out_separator, validation))
