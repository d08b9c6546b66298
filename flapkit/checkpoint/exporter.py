"""Forms that a pruned model is written in, for other programs to run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, TypeAlias

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flapkit.model.component import Component
from flapkit.model.site import Kind, Site

Runner: TypeAlias = Callable[[Tensor], Tensor]
"""Runs an exported file: tokens [n] -> logits [n, vocabulary], float32 on the CPU."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """A pruned model as far as it is known: before a run from the recipe, afterwards from the model itself.

    Args:
        family: model type of the dense models, such as ``llama``.
        config: the dense model's configuration before the run, the pruned one's afterwards.
        sites: the prunable places, at the sizes that the configuration has.
        uniform: all layers are alike, or will be.
        biases: the kinds of sites whose consumers hold a bias, or will.
    """

    family: str
    config: PreTrainedConfig
    sites: tuple[Site, ...]
    uniform: bool
    biases: frozenset[Kind]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A pruned checkpoint to export.

    Args:
        folder: where it lies; ``flapkit.load`` and safetensors read it.
        prospect: what it is.
        tokenizer: its tokenizer, if it has one.
    """

    folder: Path
    prospect: Prospect
    tokenizer: PreTrainedTokenizerBase | None


@dataclass(frozen=True)
class Exporter(Component):
    """A form that a pruned model is written in, for other programs to run.

    Every export is then run and compared with the pruned model.

    Args:
        verify: run what was written, and compare its logits with the pruned model's.
    """

    verify: Annotated[bool, Field(description="Run what was written, and compare it with the pruned model.")] = True

    suffix: ClassVar[str] = ""
    """Ending of the file that is written; empty for a folder."""

    extra: ClassVar[str] = ""
    """The extra of flapkit that installs ``packages``."""

    @property
    def packages(self) -> Sequence[str]:
        """Import names of the packages that the export needs beyond flapkit's own."""
        return ()

    @property
    def label(self) -> str:
        """What a recipe's export is called in the output folder; two exports of a recipe need two labels."""
        return self.name

    @property
    def tolerance(self) -> float | None:
        """The largest difference of a logit that passes, as a share of the largest logit; None: any finite one."""
        return 1e-4

    def check(self, prospect: Prospect) -> None:
        """Raise ``ModelError`` where such a model cannot be written, and say the way out; asked before a run, too."""
        return None

    @abstractmethod
    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write the model.

        Args:
            checkpoint: what to write; ``check`` has passed.
            path: a file that is not there yet, or an empty folder: see ``suffix``.
        """

    @abstractmethod
    def open(self, path: Path) -> AbstractContextManager[Runner]:
        """Load what ``write`` wrote into the program that it is for.

        Args:
            path: the file or folder.

        Returns:
            What runs it, for as long as the context lasts.
        """
