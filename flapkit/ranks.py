"""The processes of a run, where there are several: which one this is, and what they agree on.

Every process does the same, each with its share of the windows; the first alone writes and prints.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from flapkit.errors import FlapkitError, RecipeError

T = TypeVar("T")

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
"""Where torchrun, SLURM, Lightning's own launcher and a user say which process this is, before all have met."""

STARTED_VARIABLES = {"TORCHELASTIC_RUN_ID": "WORLD_SIZE", "SLURM_STEP_ID": "SLURM_STEP_NUM_TASKS"}
"""What torchrun and srun set -> where they say how many processes they started."""


def is_first() -> bool:
    """Tell whether this process is the one that writes and prints."""
    distributed = _distributed()
    if distributed is not None:
        return bool(distributed.get_rank() == 0)
    return all(int(os.environ.get(name, 0)) == 0 for name in RANK_VARIABLES)


def check_started(asked: int) -> None:
    """Raise ``RecipeError`` where torchrun or srun started another number of processes than the recipe asks for.

    Each would do the whole work, and all but one of them for nothing.

    Args:
        asked: processes that the recipe's ``trainer`` asks for, on all machines together.
    """
    for mark, name in STARTED_VARIABLES.items():
        started = int(os.environ.get(name, 1)) if mark in os.environ else 1
        if started not in (1, asked):
            raise RecipeError(
                f"trainer: {started} processes were started, and devices x num_nodes is {asked}; "
                "set trainer.devices to the processes of one machine, and trainer.num_nodes to the machines"
            )


def from_first(work: Callable[[], T]) -> T:
    """Do something in the first process alone; every process waits for it, and gets what it returned.

    Args:
        work: is called in the first process; what it returns is sent to the others.

    Raises:
        FlapkitError: what ``work`` raised, in every process.
    """
    distributed = _distributed()
    if distributed is None:
        return work()
    found: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            found[0] = work()
        except FlapkitError as error:
            found[1] = error
    distributed.broadcast_object_list(found)
    value, error = found
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


def _distributed() -> Any:
    """Return ``torch.distributed`` where the processes of this run have met, or None."""
    # Looked up, not imported: the command line asks before it needs torch, which takes seconds to import.
    distributed = sys.modules.get("torch.distributed")
    met = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if met else None
