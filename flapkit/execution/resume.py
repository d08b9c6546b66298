"""What a run keeps in its work folder as it comes, and finds there when it goes on after it was stopped."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter
from safetensors import SafetensorError
from torch import Tensor

from flapkit.checkpoint.weights import Weights, grouped, read_metadata, write_tensors
from flapkit.execution.cache import hash_tensors
from flapkit.model.site import Site
from flapkit.pruning.collector import Collector
from flapkit.pruning.statistics import SiteStatistics
from flapkit.system.json_files import parse_json
from flapkit.system.processes import is_rank_zero
from flapkit.system.workdir import WorkDir, damaged_as_output_error, disk_error, write_file

T = TypeVar("T")

CHECKSUM = "checksum"

STATES = "statistics"
"""How the files of statistics so far begin."""

log = logging.getLogger(__name__)


class Record(NamedTuple):
    """A finished piece of the work.

    Args:
        tensors: by name.
        metadata: what else is known, as JSON holds it.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, Any] = {}


Keep = Callable[[str, Callable[[], Record]], Record]
"""Finds a piece of a name, or makes it and keeps it."""


def make_without_store(name: str, make: Callable[[], Record]) -> Record:
    """Make a piece, and keep nothing: for work without a folder."""
    return make()


def write_record(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors of a finished piece of the work, whole or not at all.

    Args:
        path: the file; its folder is made.
        tensors: by name.
        metadata: what the file says of itself.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from error


def checksummed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what a file says of itself, and a checksum of all that is in it.

    Args:
        tensors: by name.
        metadata: what else it says.
    """
    return {**metadata, CHECKSUM: _checksum(tensors, metadata)}


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    text = json.dumps([hash_tensors(sorted(tensors.items())), dict(metadata)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_checksummed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file whose checksum was written by ``checksummed``.

    Returns:
        The tensors by name, and what the file says of itself.

    Raises:
        OutputError: the file is damaged.
    """
    with damaged_as_output_error(path):
        weights, metadata = Weights.of([path]), read_metadata(path)
        tensors = weights.read(weights)
        if metadata.pop(CHECKSUM, None) != _checksum(tensors, metadata):
            raise ValueError("its checksum does not fit")
    return tensors, metadata


class ResumeStore:
    """The pieces of a run in its work folder.

    Args:
        work: the folder.
        save_every: minutes of calibration after which what was measured so far is saved; 0 to save after each batch.
        clock: returns the time in seconds.
        origin: what statistics depend on, where the work folder does not hold the work of one recipe alone.
    """

    def __init__(
        self, work: WorkDir, save_every: float, clock: Callable[[], float] = time.monotonic, origin: str = ""
    ) -> None:
        self._work = work
        self._origin = origin
        self._seconds = 60 * save_every
        self._clock = clock

    def find(self, name: str, make: Callable[[], Record]) -> Record:
        """Find what a stopped run has finished, or finish it now and keep it; the statistics so far have then served.

        Args:
            name: what the piece is called.
            make: makes it.

        Raises:
            OutputError: it cannot be written, or is damaged.
        """
        path = self._work.path(f"{name.replace('/', '_')}.safetensors")
        if self._work.resumed and path.is_file():
            tensors, metadata = read_checksummed(path)
            return Record(tensors, json.loads(metadata["says"]))
        piece = make()
        if is_rank_zero():
            write_record(path, piece.tensors, checksummed(piece.tensors, {"says": json.dumps(piece.metadata)}))
            for states in self._work.folder.glob(f"{STATES}-*"):
                states.unlink()
        return piece

    def figures(self, name: str, kind: Any, measure: Callable[[], T]) -> T:
        """Find figures that a stopped run has measured, or measure them now; they are kept if that took long enough.

        Args:
            name: what they are called.
            kind: their type, made of dataclasses and of what JSON holds.
            measure: measures them.

        Raises:
            OutputError: they cannot be written, or are damaged.
        """
        path = self._work.path(f"{name}.json")
        if self._work.resumed and path.is_file():
            with damaged_as_output_error(path):
                found: T = TypeAdapter(kind).validate_python(parse_json(path.read_text(encoding="utf-8")))
            return found
        began = self._clock()
        found = measure()
        if found and is_rank_zero() and self._clock() - began >= self._seconds:
            write_file(path, json.dumps(found, default=asdict))
        return found

    def states(self, what: str) -> States:
        """Return where a calibration saves its statistics so far.

        Args:
            what: which calibration it is, of all that a run may need.
        """
        return States(self._work, self._origin + what, self._seconds, self._clock)


class States:
    """The statistics of a calibration that is under way, which each process saves in a file of its own.

    Args:
        work: the work folder.
        what: which calibration it is.
        seconds: how long statistics are measured before they are saved; 0 to save after each batch.
        clock: returns the time in seconds.
    """

    def __init__(self, work: WorkDir, what: str, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._work = work
        self._what = what
        self._seconds = seconds
        self._clock = clock
        self._path = Path()
        self._saved: float | None = None
        self._began = clock()

    def begin(self, collector: Collector, sites: Sequence[Site], rank: int, ranks: int) -> int:
        """Find out where a stopped calibration had come to, and let the collector go on from there.

        Args:
            collector: measures; gets the statistics.
            sites: where it measures.
            rank: this process's number.
            ranks: how many there are.

        Returns:
            How many batches were done.

        Raises:
            OutputError: what was saved is damaged.
        """
        self._path = self._work.path(f"{STATES}-{rank}-of-{ranks}.safetensors")
        self._began = self._clock()
        if not self._work.resumed or not self._path.is_file():
            return 0
        tensors, metadata = read_checksummed(self._path)
        if metadata["what"] != self._what:
            return 0
        parts = grouped(tensors)
        collector.statistics = {
            site.name: SiteStatistics(
                type(each).restored(site, parts[f"{site.name}/{type(each).__qualname__}"])
                for each in collector.statistics[site.name].values()
            )
            for site in sites
        }
        self._saved = self._began
        batches = int(metadata["batches"])
        log.info("calibration goes on behind batch %d", batches)
        return batches

    def save(self, collector: Collector, batches: int, *, last: bool = False) -> None:
        """Save the statistics so far, if it is time; where they cannot be saved, a warning says so.

        Args:
            collector: has them.
            batches: how many batches are done.
            last: it is the end: what is worth going on with is saved if anything was before.
        """
        due = self._clock() - (self._began if self._saved is None else self._saved) >= self._seconds
        if not due and not (last and self._saved is not None):
            return
        try:
            tensors = {
                f"{name}/{type(each).__qualname__}/{part}": tensor
                for name, statistics in collector.statistics.items()
                for each in statistics.values()
                for part, tensor in each.saved().items()
            }
            write_tensors(self._path, tensors, checksummed(tensors, {"what": self._what, "batches": str(batches)}))
        except (TypeError, OSError, SafetensorError) as error:
            log.warning("the statistics so far cannot be saved for a run that goes on: %s", error)
        self._saved = self._clock()
