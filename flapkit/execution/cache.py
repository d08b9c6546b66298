"""Statistics that were measured once are found again: calibration is what a run costs, the rest is cheap.

A file holds one statistic of all sites. Its name is a hash of everything that the statistic depends on: the weights,
byte for byte in the type in which they run; the configuration and class of the model, its attention implementation,
Lightning's precision and the kind of device; the calibration rows with masks and marks; the sites; the source of the
statistic and of calibration itself; the versions of torch and transformers. The batch size is left out, as statistics
do not depend on it but for rounding.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

import flapkit.pruning.collector
from flapkit.checkpoint.weights import grouped, remove_abandoned, write_tensors
from flapkit.model.site import Site
from flapkit.pruning.statistics import Statistic

log = logging.getLogger(__name__)

SiteStates = Mapping[str, Statistic]
"""Site name -> one statistic."""


def cache_folder() -> Path:
    """Return where statistics are kept: ``$FLAPKIT_CACHE``, or ``flapkit`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("FLAPKIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flapkit"


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration, as a hash of all that its statistics depend on but for the statistics themselves.

    Args:
        sites: where is measured.
        digest: hexadecimal SHA-256.
        metadata: what a file says of its origin, for whoever lists the cache.
    """

    sites: tuple[Site, ...]
    digest: str
    metadata: Mapping[str, str]

    @classmethod
    def of(
        cls, model: PreTrainedModel, sites: Sequence[Site], rows: Iterable[Mapping[str, Tensor]], numerics: str
    ) -> Calibrated:
        """Hash a calibration.

        Args:
            model: the dense model, as it will run.
            sites: where is measured.
            rows: the calibration windows, with whatever marks they carry.
            numerics: what else changes the numbers: the kind of device, Lightning's precision.
        """
        config = {key: value for key, value in model.config.to_dict().items() if key not in _UNRELATED}
        parts = {
            "weights": hash_tensors(model.state_dict().items()),
            "config": json.dumps(config, sort_keys=True, default=str),
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "attention": str(model.config._attn_implementation),
            "numerics": numerics,
            "rows": hash_tensors((f"{index} {name}", row[name]) for index, row in enumerate(rows) for name in row),
            "sites": repr(tuple(sites)),
            "calibration": hashlib.sha256(_source(flapkit.pruning.collector.__name__)).hexdigest(),
            "versions": " ".join(version(package) for package in ("torch", "transformers")),
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        metadata = {"model": str(model.config.name_or_path), "weights": parts["weights"], "rows": parts["rows"]}
        return cls(tuple(sites), digest, metadata)

    def file(self, folder: Path, statistic: type[Statistic]) -> Path:
        """Return the file of a statistic, whether or not there is one.

        Raises:
            FileNotFoundError: the statistic's class has no source file, as in a notebook.
        """
        digest = hashlib.sha256(f"{self.digest} {statistic.__module__}.{statistic.__qualname__}".encode())
        for parent in statistic.__mro__:
            if issubclass(parent, Statistic):
                digest.update(_source(parent.__module__))
        return folder / "statistics" / f"{digest.hexdigest()[:32]}.safetensors"


_UNRELATED = ("_name_or_path", "transformers_version", "dtype")
"""What a configuration says beside what the model computes; the dtype is that of the weights."""


def _source(module: str) -> bytes:
    """Return a whole source file: what a class does also depends on what stands beside it."""
    file = getattr(sys.modules[module], "__file__", None)
    if file is None:
        raise FileNotFoundError(f"{module} has no source file")
    return Path(file).read_bytes()


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of names, types, shapes and bytes of tensors; large ones are hashed on several threads."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        digests = pool.map(lambda item: _hash(*item), tensors)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _hash(name: str, tensor: Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def read_statistic(
    folder: Path, calibrated: Calibrated, statistic: type[Statistic], device: torch.device
) -> SiteStates | None:
    """Find a statistic that was measured before.

    Args:
        folder: the cache.
        calibrated: what the statistic depends on.
        statistic: its class.
        device: where it goes.

    Returns:
        None where there is none, or where its file is damaged: then a warning says so.
    """
    try:
        path = calibrated.file(folder, statistic)
    except FileNotFoundError:
        return None
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            checksum = (file.metadata() or {}).get("checksum")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        if checksum != hash_tensors(sorted(tensors.items())):
            raise ValueError("its checksum does not fit")
        saved = grouped(tensors)
        return {site.name: statistic.restored(site, saved[site.name]).to(device) for site in calibrated.sites}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        log.warning("%s: damaged (%s); %s is measured anew", path, error, statistic.__name__)
        return None


def write_statistic(folder: Path, calibrated: Calibrated, statistic: type[Statistic], measured: SiteStates) -> None:
    """Keep a statistic for later runs: the whole file or none. Where it cannot be written, a warning says so.

    Args:
        folder: the cache.
        calibrated: what the statistic depends on.
        statistic: its class.
        measured: site name -> what was measured.
    """
    try:
        tensors = {
            f"{site}/{name}": value.detach().cpu().contiguous()
            for site, states in measured.items()
            for name, value in states.saved().items()
        }
    except TypeError as error:
        log.warning("%s; it is not kept for later runs", error)
        return
    checksum = hash_tensors(sorted(tensors.items()))
    metadata = {**calibrated.metadata, "statistic": statistic.__qualname__, "checksum": checksum}
    try:
        path = calibrated.file(folder, statistic)
        remove_abandoned(path.parent)
        write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be kept in %s for later runs: %s", statistic.__name__, folder, error)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache.

    Args:
        path: where it is.
        size: bytes.
        statistic: what it holds; nothing where it cannot be read.
        model: the model that was measured, as it was called.
    """

    path: Path
    size: int
    statistic: str = ""
    model: str = ""


def entries(folder: Path) -> list[Entry]:
    """List what the cache holds, also what a killed run has left half-written; the newest first."""
    files = [path for path in (folder / "statistics").glob("*") if path.suffix in (".safetensors", ".partial")]
    return [_entry(path) for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)]


def _entry(path: Path) -> Entry:
    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return Entry(path, size)
    return Entry(path, size, metadata.get("statistic", ""), metadata.get("model", ""))


def clear(folder: Path) -> list[Entry]:
    """Remove all statistics, and nothing else; return what was removed."""
    removed = entries(folder)
    for entry in removed:
        entry.path.unlink(missing_ok=True)
    return removed
