"""Which of several processes this one is: the first alone writes and prints."""

from __future__ import annotations

import os
import sys

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
"""Where torchrun, SLURM and Lightning's own launcher say so, before the processes have found each other."""


def rank() -> int:
    """Return this process's number among those of the run, from 0."""
    # Looked up, not imported: the command line asks before it needs torch, which takes seconds to import.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return next((int(os.environ[name]) for name in RANK_VARIABLES if name in os.environ), 0)


def is_first() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return rank() == 0
