"""Recovery: a short training of the pruned model. A compensator describes it; the core runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from flapkit.model.site import Site
from flapkit.system.options import Count
from flapkit.text.mix import TextMix
from flapkit.text.source import Dataset, Split, Subset, TextField, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VALIDATION_ONE_IN = 10
"""One document in this many is held out of the recovery text, to choose the best step."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a pruned model is trained: the options that every compensator with a recovery has in a recipe.

    Gradient accumulation, clipping and precision are set in the recipe's ``trainer``.
    """

    dataset: Annotated[Dataset | None, Field(description="Training text; by default the calibration text.")] = None
    subset: Subset = None
    split: Split = None
    field: TextField = None
    validation: Annotated[
        TextSource | None,
        Field(description="Validation text, which chooses the best step; by default a tenth of the training text."),
    ] = None
    validation_windows: Annotated[Count, Field(ge=1, description="Validation windows.")] = 64
    validate_every: Annotated[Count, Field(ge=1, description="Steps between validations.")] = 50
    patience: Annotated[
        int | None,
        Field(ge=1, description="Stop after this many validations without improvement; by default never."),
    ] = None
    length: Annotated[Count, Field(ge=2, description="Tokens in a window.")] = 256
    batch_size: Annotated[
        Count, Field(ge=1, description="Windows that go through the model at once, on each device.")
    ] = 8
    steps: Annotated[Count, Field(ge=1, description="Optimizer steps.")] = 500
    lr: Annotated[float, Field(gt=0, description="Peak learning rate.")] = 1e-4
    warmup: Annotated[
        float, Field(ge=0, lt=1, description="Fraction of the steps in which the learning rate rises before it falls.")
    ] = 0.05
    weight_decay: Annotated[float, Field(ge=0, description="Decoupled weight decay of matrices.")] = 0.0
    distill: Annotated[
        bool, Field(description="Learn from the dense model's predictions as well; it stays in memory.")
    ] = False
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Seed of the windows and of the training.")] = 0

    def __post_init__(self) -> None:
        """Refuse options that would be ignored."""
        if self.dataset is None and (self.subset or self.split or self.field):
            raise ValueError("`subset`, `split` and `field` need `dataset`")

    def source(self, calibration: TextMix) -> TextMix:
        """Return where the training text comes from.

        Args:
            calibration: what to use where ``dataset`` is not given.
        """
        if self.dataset is None:
            return calibration
        own = TextSource(dataset=self.dataset, subset=self.subset, split=self.split, field=self.field)
        return TextMix.of(own, "recovery text")

    def validation_source(self) -> TextMix | None:
        """Return where the validation text comes from; None to hold out a part of the training text."""
        return None if self.validation is None else TextMix.of(self.validation, "validation text of the recovery")


class Trainable(Protocol):
    """The trainable part that a recovery adds to a model, such as a LoRA adapter."""

    def merge_(self) -> None:
        """Merge the trained part into the model's own weights, in place, and remove it."""

    def remove_(self) -> None:
        """Remove the trained part, in place, so that the model is as before."""

    def files(self) -> Mapping[str, bytes]:
        """Return the trained part as files, name -> content."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """A training that repairs the pruned model.

    Args:
        training: the text, the number of steps, the learning rate.
        attach: adds the trainable part to the pruned model, in place, and freezes everything else. The model's output
            must not change. Takes the model, and the sites of the dense model, of which only the names matter.
        merge: merge the trained part into the weights at the end; otherwise it is saved beside them.
    """

    training: Training
    attach: Callable[[PreTrainedModel, Sequence[Site]], Trainable]
    merge: bool = True

    def begin(self, model: PreTrainedModel, sites: Sequence[Site]) -> Trainable:
        """Attach the trainable part, initialised from the training's seed."""
        with torch.random.fork_rng():
            torch.manual_seed(self.training.seed)
            return self.attach(model, sites)


def divergence(student: Tensor, teacher: Tensor, attended: Tensor) -> Tensor:
    """Return the mean of KL(teacher || student) over predicted tokens.

    Hinton et al. (arXiv 1503.02531), section 2, at temperature 1.

    Args:
        student: logits [windows, tokens, vocabulary].
        teacher: logits of the same shape.
        attended: which tokens are not padding, bool [windows, tokens]. The last token of a window, and the last one
            before padding, are left out: they have no next token to predict.

    Returns:
        Nats per predicted token, a scalar in float32.
    """
    counts = attended[:, :-1] & attended[:, 1:]
    log_student, log_teacher = (logits[:, :-1][counts].float().log_softmax(-1) for logits in (student, teacher))
    return functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def next_token_loss(logits: Tensor, tokens: Tensor, attended: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token.

    Args:
        logits: [windows, tokens, vocabulary].
        tokens: the windows [windows, tokens].
        attended: which tokens are not padding, bool [windows, tokens]; pairs with padding are left out.

    Returns:
        Nats per predicted token, a scalar in float32.
    """
    counts = attended[:, :-1] & attended[:, 1:]
    return functional.cross_entropy(logits[:, :-1][counts].float(), tokens[:, 1:][counts])


def hold_out(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split documents into training and validation: one in ten validates.

    If there are fewer than ten, the last tenth of each document is held out instead.

    Returns:
        The documents to train on, and those to validate on.
    """
    if len(documents) >= VALIDATION_ONE_IN:
        held_out = [document for index, document in enumerate(documents) if _validates(index)]
        return [document for index, document in enumerate(documents) if not _validates(index)], held_out
    ends = [len(document) - len(document) // VALIDATION_ONE_IN for document in documents]
    cut = list(zip(documents, ends, strict=True))
    return [document[:end] for document, end in cut], [document[end:] for document, end in cut]


def _validates(index: int) -> bool:
    return index % VALIDATION_ONE_IN == VALIDATION_ONE_IN - 1
