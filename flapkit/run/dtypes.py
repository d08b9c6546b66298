"""The types of a run: in which the model computes, and in which the pruned weights are written."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flapkit.model.precision import name_of
from flapkit.recipe.schema import Model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DTypes:
    """The types of a model's weights.

    Args:
        stored: in the dense checkpoint.
        compute: in memory, and of the forward passes.
        saved: in the checkpoint that is written.
    """

    stored: torch.dtype
    compute: torch.dtype
    saved: torch.dtype

    @property
    def summary(self) -> str:
        """Say all three."""
        return (
            f"computes in {name_of(self.compute)}; the checkpoint is {name_of(self.stored)}, "
            f"the pruned one will be {name_of(self.saved)}"
        )

    def names(self) -> dict[str, str]:
        """Name all three, for ``flapkit.json``."""
        return {"stored": name_of(self.stored), "compute": name_of(self.compute), "saved": name_of(self.saved)}

    def tell(self) -> None:
        """Log the types where they differ."""
        if len({self.stored, self.compute, self.saved}) > 1:
            log.info("%s", self.summary)


def choose_dtypes(settings: Model, config: PreTrainedConfig, device: torch.device) -> DTypes:
    """Choose the types of a run.

    ``dtype: auto`` is the checkpoint's type, but float32 on a CPU, which computes several times slower in 16 bits.
    ``save_dtype: auto`` is the checkpoint's type too, but never wider than what was computed in.

    Args:
        settings: the recipe's model.
        config: the dense model's configuration.
        device: what the model runs on.
    """
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if settings.dtype != "auto":
        compute: torch.dtype = getattr(torch, settings.dtype)
    else:
        compute = torch.float32 if device.type == "cpu" and stored.itemsize < 4 else stored
    if settings.save_dtype != "auto":
        saved: torch.dtype = getattr(torch, settings.save_dtype)
    else:
        saved = stored if stored.itemsize < compute.itemsize else compute
    return DTypes(stored, compute, saved)
