"""The text of a run, as tokens; it is read before any model is loaded, so that problems show early."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flapkit.evaluation.protocol import EvaluationText, cut_text
from flapkit.execution.runtime import Runtime
from flapkit.execution.training import RecoveryText, windows_per_step
from flapkit.model.adapter import ArchitectureAdapter
from flapkit.pruning.recovery import Training, hold_out
from flapkit.recipe.schema import Calibration, Evaluate, Perplexity, Recipe, Samples
from flapkit.run.target import Target
from flapkit.run.tasks import check_tasks
from flapkit.system.errors import DataError, RecipeError
from flapkit.system.paths import name_only
from flapkit.text.conversations import Conversation
from flapkit.text.mix import Documents, TextMix, draw_mix, naming
from flapkit.text.overlap import NOTEWORTHY, Overlap, find_overlap
from flapkit.text.source import Render, TextSource
from flapkit.text.windows import Encoded, TokenStore, encode_measured

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


def check_text(recipe: Recipe) -> None:
    """Check all text of a recipe, and its tasks, as far as possible without a network and without reading any.

    Raises:
        InputError: the first problem.
    """
    # The sources of a mix name their own keys.
    with naming("" if recipe.calibration.mix else "calibration"):
        recipe.calibration.text.check("calibration")
    check_evaluation(recipe.evaluate)


def check_evaluation(evaluate: Evaluate) -> None:
    """Check the text and the tasks of an evaluation, as ``check_text`` does.

    Raises:
        InputError: the first problem.
    """
    for index, text in enumerate(evaluate.perplexity):
        with naming(f"evaluate.perplexity.{index}"):
            text.check("evaluation")
    if evaluate.zero_shot is not None:
        check_tasks(evaluate.zero_shot)


def read_text(
    recipe: Recipe, target: Target, tokenizer: PreTrainedTokenizerBase, store: TokenStore | None = None
) -> RunText:
    """Read the calibration text and every evaluation text of a recipe.

    Args:
        recipe: the recipe.
        target: the model.
        tokenizer: the model's tokenizer.
        store: where tokens are kept; None for nowhere.

    Raises:
        DataError: a text cannot be read or is too short, or the tokenizer does not fit the model.
    """
    render = renderer(target.adapter, tokenizer)
    evaluations = read_evaluations(recipe.evaluate.perplexity, tokenizer, render, target.vocab_size, store)
    calibration = calibration_windows(recipe.calibration, target, tokenizer, store)
    compared = {
        name: replace(text, overlap=warn_of_overlap(name, text, calibration, "calibration"))
        for name, text in evaluations.items()
    }
    return RunText(calibration, recipe.calibration.batch_size, compared)


def read_evaluations(
    texts: Sequence[Perplexity],
    tokenizer: PreTrainedTokenizerBase,
    render: Render | None,
    vocab_size: int,
    store: TokenStore | None = None,
) -> dict[str, EvaluationText]:
    """Read evaluation texts, by their names.

    Args:
        texts: the recipe's entries.
        tokenizer: the model's tokenizer.
        render: converts a conversation to text; None if conversations are not supported.
        vocab_size: the model's.
        store: where tokens are kept; None for nowhere.

    Raises:
        DataError: a text cannot be read or is too short, or the tokenizer does not fit the model.
    """
    # Several measurements of one text, such as with and without a stride, read it once.
    read: dict[TextSource, Encoded] = {}
    evaluations: dict[str, EvaluationText] = {}
    for name, settings in name_evaluations(texts).items():
        source = TextSource(**settings.model_dump(include=set(TextSource.model_fields)))
        if source not in read:
            documents, separator = source.documents("evaluation", render), source.separator("evaluation") or "\n\n"
            read[source] = encode_measured(tokenizer, documents, separator, vocab_size, store=store)
        evaluations[name] = _cut(settings, read[source], tokenizer)
    return evaluations


def _cut(settings: Perplexity, text: Encoded, tokenizer: PreTrainedTokenizerBase) -> EvaluationText:
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
            "%s: %.1f %% of its scored tokens are in sequences of %d tokens that the %s text also contains, so its "
            "perplexity is too low",
            name,
            100 * overlap.share,
            overlap.ngram,
            purpose,
        )
    return overlap


def calibration_windows(
    settings: Calibration, target: Target, tokenizer: PreTrainedTokenizerBase, store: TokenStore | None = None
) -> Tensor:
    """Draw the calibration windows of a recipe, [windows, tokens]."""
    return draw_mix(
        tokenizer,
        settings.text.documents("calibration", renderer(target.adapter, tokenizer)),
        samples=settings.samples,
        length=settings.length,
        seed=settings.seed,
        vocab_size=target.vocab_size,
        store=store,
    )


def recovery_source(training: Training, recipe: Recipe) -> TextMix:
    """Return where a recovery's training text comes from. All its text is checked, as by ``check_text``.

    Raises:
        DataError: the first problem of a text.
        RecipeError: training or validation text is evaluated as well, which would make the figure meaningless.
    """
    mix, validating = training.source(recipe.calibration.text), training.validation_source()
    used_for = [(mix, "train")] if validating is None else [(mix, "train"), (validating, "validate")]
    for used, purpose in used_for:
        used.check("calibration")
        for source in used.sources:
            if any(source.shares_text(evaluation) for evaluation in recipe.evaluate.perplexity):
                raise RecipeError(
                    f"compensator: the recovery would {purpose} on {source.dataset}, and `evaluate` measures the "
                    "perplexity of the same text; choose other text for one of them"
                )
    return mix


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
        text = _by_adapter(adapter, tokenizer, conversation)
        return _by_template(tokenizer, conversation) if text is None else text

    return render


def render_prompts(
    settings: Samples | None, adapter: ArchitectureAdapter | None, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Return the text of the prompts of a recipe; a conversation ends where the model's answer begins.

    Args:
        settings: the prompts; None for none.
        adapter: the model's adapter, whose ``render`` has precedence.
        tokenizer: the model's tokenizer.

    Raises:
        DataError: the model has no format for conversations, or its format does not allow one of them.
    """
    texts = []
    for prompt in settings.prompts if settings else ():
        if isinstance(prompt, str):
            texts.append(prompt)
            continue
        messages: Conversation = [message.model_dump() for message in prompt]
        try:
            texts.append(_render_open(messages, adapter, tokenizer))
        except DataError as error:
            raise DataError(f"evaluate.samples.prompts: {error}") from error
    return texts


def _render_open(
    messages: Conversation, adapter: ArchitectureAdapter | None, tokenizer: PreTrainedTokenizerBase
) -> str:
    """Render a conversation up to the beginning of the assistant's next message."""
    text = _by_adapter(adapter, tokenizer, [*messages, {"role": "assistant", "content": ""}])
    return _by_template(tokenizer, messages, add_generation_prompt=True) if text is None else text


def _by_adapter(
    adapter: ArchitectureAdapter | None, tokenizer: PreTrainedTokenizerBase, conversation: Conversation
) -> str | None:
    """Render a conversation by the adapter, behind the tokenizer's start token; None if the adapter has no format."""
    text, start = adapter.render(conversation) if adapter else None, tokenizer.bos_token or ""
    return None if text is None else start + text.removeprefix(start)


def _by_template(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, **options: Any) -> str:
    if not tokenizer.chat_template:
        raise DataError("the model has no format for conversations: neither its adapter nor its tokenizer has one")
    try:
        messages = [dict(message) for message in conversation]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:
        raise DataError(f"the tokenizer's chat template fails on it: {type(error).__name__}: {error}") from error


def read_recovery_text(
    training: Training,
    mix: TextMix,
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
    store: TokenStore | None = None,
) -> RecoveryText:
    """Draw the windows of a recovery: as many as its steps need; validation windows are a multiple of the devices.

    Args:
        training: the number and length of the windows, and the seed.
        mix: where the training text comes from.
        target: the model.
        tokenizer: the model's tokenizer.
        runtime: what the recovery runs on.
        store: where tokens are kept; None for nowhere.

    Raises:
        DataError: a text cannot be read or is too short, or the tokenizer does not fit the model.
    """
    render = renderer(target.adapter, tokenizer)
    texts = mix.documents("calibration", render)
    validating = training.validation_source()
    if validating is None:
        halves = [hold_out(documents.texts) for documents in texts]
        held_out = [replace(documents, texts=rest) for documents, (_, rest) in zip(texts, halves, strict=True)]
        texts = [replace(documents, texts=first) for documents, (first, _) in zip(texts, halves, strict=True)]
    else:
        held_out = validating.documents("calibration", render)

    def draw(documents: Sequence[Documents], samples: int) -> Tensor:
        return draw_mix(
            tokenizer,
            documents,
            samples=samples,
            length=training.length,
            seed=training.seed,
            vocab_size=target.vocab_size,
            store=store,
        )

    windows = training.steps * windows_per_step(training, runtime)
    validation = runtime.processes * math.ceil(training.validation_windows / runtime.processes)
    return RecoveryText(draw(texts, windows), draw(held_out, validation))
