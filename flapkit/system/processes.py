"""The processes of a run, where there are several: which one this is, and what they agree on.

Every process does the same, each with its share of the windows; the first alone writes and prints.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from flapkit.system.errors import FlapkitError, RecipeError, RunError

K = TypeVar("K")
T = TypeVar("T")

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
"""Where torchrun, SLURM, Lightning's own launcher and a user say which process this is, before all have met."""

STARTED_VARIABLES = {"TORCHELASTIC_RUN_ID": "WORLD_SIZE", "SLURM_STEP_ID": "SLURM_STEP_NUM_TASKS"}
"""What torchrun and srun set -> where they say how many processes they started."""


def rank() -> int:
    """Return this process's number among those of the run, from 0."""
    distributed = _distributed()
    if distributed is not None:
        return int(distributed.get_rank())
    return max(int(os.environ.get(name, 0)) for name in RANK_VARIABLES)


def is_rank_zero() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return rank() == 0


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


def window_share() -> dict[str, int] | None:
    """Return this process's share of the windows as torch's distributed samplers take it; None for all of them."""
    distributed = _distributed()
    if distributed is None or distributed.get_world_size() == 1:
        return None
    return {"rank": int(distributed.get_rank()), "num_replicas": int(distributed.get_world_size())}


def broadcast_from_rank0(work: Callable[[], T]) -> T:
    """Do something in the first process alone; every process waits for it, and gets what it returned.

    Args:
        work: is called in the first process; what it returns is sent to the others.

    Raises:
        FlapkitError: what ``work`` raised, in every process.
        RunError: another process is gone.
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
    with lost_processes():
        distributed.broadcast_object_list(found)
    value, failed = found
    if failed is not None:
        raise failed
    return value  # type: ignore[no-any-return]


def keep_common(mine: Mapping[K, T | None]) -> dict[K, T]:
    """Keep what every process has: what one of them lacks, all have to make anew.

    Args:
        mine: by the same names, in the same order, in every process; None for what this process lacks.
    """
    distributed = _distributed()
    has = [[value is not None for value in mine.values()]]
    if distributed is not None:
        has = [[] for _ in range(distributed.get_world_size())]
        with lost_processes():
            distributed.all_gather_object(has, [value is not None for value in mine.values()])
    everywhere = map(all, zip(*has, strict=True))
    pairs = zip(mine.items(), everywhere, strict=True)
    return {name: value for (name, value), kept in pairs if kept and value is not None}


@contextmanager
def lost_processes() -> Iterator[None]:
    """Say in plain words that another process is gone, where this one waited for it.

    Raises:
        RunError: in place of what torch raises then.
    """
    try:
        yield
    except RuntimeError as error:
        if not _tells_of_loss(error):
            raise
        raise RunError(
            "another process of this run has ended: by the error that it told of, or killed, as for want of memory"
        ) from error


def _tells_of_loss(error: RuntimeError) -> bool:
    distributed = _distributed()
    # gloo has no error of its own.
    return distributed is not None and (isinstance(error, distributed.DistError) or "gloo/transport" in str(error))


def _distributed() -> Any:
    """Return ``torch.distributed`` where the processes of this run have met, or None."""
    # Looked up, not imported: the command line asks before it needs torch, which takes seconds to import.
    distributed = sys.modules.get("torch.distributed")
    met = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if met else None
