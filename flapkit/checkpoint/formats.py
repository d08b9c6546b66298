"""Exporters: write a pruned model in the formats of other programs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeAlias

from pydantic import Field
from torch import Tensor

from flapkit.model.component import Component
from flapkit.model.site import Kind, Site

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Runner: TypeAlias = Callable[[Tensor], Tensor]
"""Runs an exported model: tokens [n] -> logits [n, vocabulary], float32 on the CPU."""

MAY_REMOVE = "the searcher may remove an attention or an MLP altogether"
"""Said before a run, of what needs both in every layer."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """A pruned model as far as it is known: from the recipe before a run, from the model itself afterwards.

    Args:
        family: dense model type, such as ``llama``.
        config: the dense model's configuration before the run, the pruned model's afterwards.
        sites: the sites, with the configuration's sizes.
        uniform: whether all layers have, or will have, the same sizes.
        biases: the kinds of sites whose consumers have, or will have, a bias.
        multiple_of: before the run, the number whose multiples the pruned widths will be; None afterwards.
        removed: attentions and MLPs that are gone altogether, such as ``layers.0.attention``.
        may_remove: before the run, whether attentions and MLPs may go altogether.
    """

    family: str
    config: PreTrainedConfig
    sites: tuple[Site, ...]
    uniform: bool
    biases: frozenset[Kind]
    multiple_of: int | None = None
    removed: tuple[str, ...] = ()
    may_remove: bool = False

    @property
    def without(self) -> str:
        """A clause that names an attention or an MLP that is gone, or may be; empty if all keep units."""
        if self.removed:
            return f"{self.removed[0]} is gone altogether"
        return MAY_REMOVE if self.may_remove else ""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A pruned checkpoint to export.

    Args:
        folder: its folder, for ``flapkit.load`` and safetensors.
        prospect: its description.
        tokenizer: its tokenizer, or None.
    """

    folder: Path
    prospect: Prospect
    tokenizer: PreTrainedTokenizerBase | None


@dataclass(frozen=True)
class Exporter(Component):
    """Writes a pruned model in the format of another program.

    Args:
        verify: run the exported model, and compare its logits with the pruned model's.
    """

    verify: Annotated[bool, Field(description="Run the exported model and compare it with the pruned model.")] = True

    suffix: ClassVar[str] = ""
    """Suffix of the exported file; empty for a folder."""

    extra: ClassVar[str] = ""
    """The extra of flapkit that installs ``packages``."""

    sees: ClassVar[bool] = False
    """Whether it writes vision-language models, too."""

    @property
    def packages(self) -> Sequence[str]:
        """Import names of the packages that the export needs beyond flapkit's own."""
        return ()

    @property
    def label(self) -> str:
        """Name of a recipe's export in the output folder, without suffix; unique within a recipe."""
        return self.name

    @property
    def tolerance(self) -> float | None:
        """The largest allowed difference of a logit, as a fraction of the largest logit; None allows any finite one."""
        return 1e-4

    def check(self, prospect: Prospect) -> None:
        """Raise ``ModelError``, with advice, if the format cannot hold such a model; also called before a run."""
        return None

    @abstractmethod
    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write the model.

        Args:
            checkpoint: the checkpoint to export; ``check`` has passed.
            path: a file that does not exist yet, or an empty folder (see ``suffix``).
        """

    @abstractmethod
    def open(self, path: Path) -> AbstractContextManager[Runner]:
        """Load the output of ``write`` into the program that it is for.

        Args:
            path: the file or folder.

        Returns:
            A context manager that yields the runner.
        """
