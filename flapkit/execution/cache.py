"""A cache of statistics and of tokens, so that later runs skip calibration, and tokenise no text again.

A file of statistics holds one statistic of all sites. Its name is a hash of everything that the statistic depends on:
the weights, in the dtype in which they run; the configuration and class of the model, its attention implementation,
Lightning's precision and the type of device; the calibration rows with their masks and marks; the sites; the name and
``version`` of the statistic; the format of records; the versions of torch and transformers. The batch size is left out:
it changes statistics only by rounding.

A file of tokens holds those of one text; its name is a hash of the text, the tokenizer, and its version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flapkit.checkpoint.gguf import FOLDER as GGUF_MODELS
from flapkit.checkpoint.gguf import SOURCE
from flapkit.checkpoint.weights import grouped, remove_abandoned
from flapkit.execution.record_files import (
    FORMAT,
    OtherFormatError,
    Record,
    RecordError,
    hash_tensors,
    read_record,
    read_record_metadata,
    write_record,
)
from flapkit.model.site import Site
from flapkit.pruning.statistics import Statistic
from flapkit.system.errors import OutputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

STATISTICS, TOKENS = "statistics", "tokens"
"""Folders of the cache."""

SiteStates = Mapping[str, Statistic]
"""Site name -> one statistic."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration, identified by a hash of everything that its statistics depend on except their classes.

    Args:
        sites: the sites to measure.
        digest: hexadecimal SHA-256.
        metadata: the origin of a file, for listing the cache.
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
            sites: the sites to measure.
            rows: the calibration windows, with their marks.
            numerics: what else changes the numbers: the type of device, Lightning's precision.
        """
        config = {key: value for key, value in model.config.to_dict().items() if key not in _UNRELATED}
        parts = {
            "weights": hash_tensors(model.state_dict().items()),
            "config": json.dumps(config, sort_keys=True, default=str),
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "attention": str(model.config._attn_implementation),
            "numerics": numerics,
            "rows": hash_tensors((f"{index} {name}", row[name]) for index, row in enumerate(rows) for name in row),
            "sites": str([dataclasses.astuple(site) for site in sites]),
            "format": str(FORMAT),
            "versions": " ".join(version(package) for package in ("torch", "transformers")),
        }
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        metadata = {"model": str(model.config.name_or_path), "weights": parts["weights"], "rows": parts["rows"]}
        return cls(tuple(sites), digest, metadata)

    def file(self, folder: Path, statistic: type[Statistic]) -> Path:
        """Return the path of a statistic's file; the file may not exist."""
        parents = [parent for parent in statistic.__mro__ if issubclass(parent, Statistic)]
        names = (f"{parent.__module__}.{parent.__qualname__} {parent.version}" for parent in parents)
        digest = hashlib.sha256(" ".join([self.digest, *names]).encode())
        return folder / STATISTICS / f"{digest.hexdigest()[:32]}.safetensors"


_UNRELATED = ("_name_or_path", "transformers_version", "dtype")
"""Configuration entries that do not change what the model computes; the dtype is that of the weights."""


def read_statistic(
    folder: Path, calibrated: Calibrated, statistic: type[Statistic], device: Callable[[Site], torch.device]
) -> SiteStates | None:
    """Read a statistic from the cache.

    Args:
        folder: the cache.
        calibrated: what the statistic depends on.
        statistic: its class.
        device: returns the device to load a site's statistic to.

    Returns:
        The statistic of each site; None if it is not in the cache, or, with a warning, if its file is damaged.
    """
    path = calibrated.file(folder, statistic)
    if not _is_cached(statistic) or not path.is_file():
        return None
    try:
        saved = grouped(read_record(path).tensors)
        return {site.name: statistic.restored(site, saved[site.name]).to(device(site)) for site in calibrated.sites}
    except OtherFormatError:
        return None
    except (RecordError, KeyError) as error:
        log.warning("%s is damaged (%s); measuring %s again", path, error, statistic.__name__)
        return None


def _is_cached(statistic: type[Statistic]) -> bool:
    """Tell whether a statistic may be cached: a class of a script or notebook has no unique name."""
    return statistic.__module__ != "__main__"


def write_statistic(folder: Path, calibrated: Calibrated, statistic: type[Statistic], measured: SiteStates) -> None:
    """Write a statistic to the cache, atomically. If it cannot be written, log a warning.

    Args:
        folder: the cache.
        calibrated: what the statistic depends on.
        statistic: its class.
        measured: site name -> the statistic.
    """
    if not _is_cached(statistic):
        return
    tensors = {f"{site}/{name}": value for site, states in measured.items() for name, value in states.state.items()}
    path = calibrated.file(folder, statistic)
    try:
        remove_abandoned(path.parent)
        write_record(path, Record(tensors, {**calibrated.metadata, "statistic": statistic.__qualname__}))
    except OutputError as error:
        log.warning("%s cannot be cached: %s", statistic.__name__, error)


class TokenCache:
    """Keeps the tokens of texts (``flapkit.text.windows.TokenStore``): in memory, and in the cache for later runs.

    Args:
        folder: the cache; None to keep them in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._known: dict[str, Mapping[str, Tensor]] = {}

    def find(self, key: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return what is kept under a key, or make and keep it; if it cannot be written, log a warning."""
        if key not in self._known:
            self._known[key] = make() if self._folder is None else self._read(self._folder, key, make)
        return self._known[key]

    @staticmethod
    def _read(folder: Path, key: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        path = folder / TOKENS / f"{key[:32]}.safetensors"
        try:
            if path.is_file():
                return read_record(path).tensors
        except OtherFormatError:
            log.info("%s: written by another version of flapkit", path)
        except RecordError as error:
            log.warning("%s: damaged (%s); the text is tokenised again", path, error)
        made = make()
        try:
            remove_abandoned(path.parent)
            write_record(path, Record(made, {"statistic": TOKENS}))
        except OutputError as error:
            log.warning("tokens cannot be cached: %s", error)
        return made


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the cache.

    Args:
        path: its path.
        size: bytes.
        statistic: class of the statistic; empty where the file cannot be read.
        model: name of the measured model.
    """

    path: Path
    size: int
    statistic: str = ""
    model: str = ""


def entries(folder: Path) -> list[Entry]:
    """List the files of the cache, the newest first, including partial files of killed runs."""
    found = (path for name in (STATISTICS, TOKENS) for path in (folder / name).glob("*"))
    files = [path for path in found if path.suffix in (".safetensors", ".partial")]
    files += (folder / GGUF_MODELS).glob("*")
    return [_entry(path) for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True)]


def _entry(path: Path) -> Entry:
    if path.is_dir():
        source = path / SOURCE
        name = source.read_text(encoding="utf-8").strip() if source.is_file() else ""
        return Entry(path, sum(file.stat().st_size for file in path.iterdir()), "model", name)
    size = path.stat().st_size
    try:
        metadata = read_record_metadata(path)
    except (RecordError, OtherFormatError):
        return Entry(path, size)
    return Entry(path, size, str(metadata.get("statistic", "")), str(metadata.get("model", "")))


def clear(folder: Path) -> list[Entry]:
    """Remove all statistics, tokens and dequantised models, and nothing else; return the removed files."""
    removed = entries(folder)
    for entry in removed:
        if entry.path.is_dir():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink(missing_ok=True)
    return removed
