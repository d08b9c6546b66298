"""The processes of a distributed run: rank, broadcast, and the loss of a process.

Every process runs the same code on its share of the windows; only rank 0 writes and prints.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from flapkit.system.errors import FlapkitError, RecipeError, RunError

if TYPE_CHECKING:
    from torch import Tensor

K = TypeVar("K")
T = TypeVar("T")

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
"""Where torchrun, SLURM, Lightning's own launcher and users give the rank, before the process group exists."""

STARTED_VARIABLES = {"TORCHELASTIC_RUN_ID": "WORLD_SIZE", "SLURM_STEP_ID": "SLURM_STEP_NUM_TASKS"}
"""A variable that torchrun or srun sets -> the variable with the number of processes that it started."""


def rank() -> int:
    """Return the rank of this process, counted from 0."""
    distributed = _distributed()
    if distributed is not None:
        return int(distributed.get_rank())
    return max(int(os.environ.get(name, 0)) for name in RANK_VARIABLES)


def is_rank_zero() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def check_started(expected: int) -> None:
    """Raise ``RecipeError`` unless torchrun or srun started as many processes as the recipe uses.

    Otherwise each process would do the whole work.

    Args:
        expected: processes of the recipe's ``trainer``, on all machines together.
    """
    for mark, name in STARTED_VARIABLES.items():
        started = int(os.environ.get(name, 1)) if mark in os.environ else 1
        if started not in (1, expected):
            raise RecipeError(
                f"trainer: the number of started processes is {started}, but devices x num_nodes is {expected}; "
                "set trainer.devices to the processes per machine, and trainer.num_nodes to the number of machines"
            )


def window_share() -> dict[str, int] | None:
    """Return this process's share of the windows as arguments of torch's distributed samplers; None for all windows."""
    distributed = _distributed()
    if distributed is None or distributed.get_world_size() == 1:
        return None
    return {"rank": int(distributed.get_rank()), "num_replicas": int(distributed.get_world_size())}


def broadcast_from_rank0(work: Callable[[], T]) -> T:
    """Call a function on rank 0 only, and return its result in every process.

    Args:
        work: the function; its result is sent to the other processes.

    Raises:
        FlapkitError: what ``work`` raised, in every process.
        RunError: another process exited.
    """
    distributed = _distributed()
    if distributed is None:
        return work()
    outcome: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            outcome[0] = work()
        except FlapkitError as error:
            outcome[1] = error
    with lost_processes():
        distributed.broadcast_object_list(outcome)
    value, failure = outcome
    if failure is not None:
        raise failure
    return value  # type: ignore[no-any-return]


def keep_common(local: Mapping[K, T | None]) -> dict[K, T]:
    """Keep the entries that every process has; what one process lacks, all must compute again.

    Args:
        local: the entries of this process, None for a missing one; the same names in the same order in every process.
    """
    distributed = _distributed()
    present = [[value is not None for value in local.values()]]
    if distributed is not None:
        present = [[] for _ in range(distributed.get_world_size())]
        with lost_processes():
            distributed.all_gather_object(present, [value is not None for value in local.values()])
    everywhere = map(all, zip(*present, strict=True))
    pairs = zip(local.items(), everywhere, strict=True)
    return {name: value for (name, value), common in pairs if common and value is not None}


def gather_tensors(tensor: Tensor) -> list[Tensor]:
    """Return a tensor of every process, of the same shape in each, in the order of their ranks."""
    distributed = _distributed()
    if distributed is None:
        return [tensor]
    gathered = [tensor.new_empty(tensor.shape) for _ in range(distributed.get_world_size())]
    with lost_processes():
        distributed.all_gather(gathered, tensor.contiguous())
    return gathered


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turn torch's errors about a lost process into ``RunError``.

    Raises:
        RunError: another process exited while this one waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_process(error):
            raise
        raise RunError("another process exited, by its own error or killed (perhaps out of memory)") from error


def _is_lost_process(error: RuntimeError) -> bool:
    distributed = _distributed()
    # gloo has no error class of its own.
    return distributed is not None and (isinstance(error, distributed.DistError) or "gloo/transport" in str(error))


def _distributed() -> Any:
    """Return ``torch.distributed`` if the process group exists, else None."""
    # Looked up, not imported: the command line asks for the rank before it imports torch, which takes seconds.
    distributed = sys.modules.get("torch.distributed")
    initialised = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if initialised else None
