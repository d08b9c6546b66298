"""A checkpoint's tensors, each read when it is asked for, and tensors written whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flapkit.model.soundness import check_finite
from flapkit.system.workdir import disk_error

INDEX = "model.safetensors.index.json"
"""The file that says which of several files holds which tensor."""

PARTIAL = ".partial"
"""How a file is called that is not whole yet."""


class Weights(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, each read when it is asked for, and memory-mapped.

    Args:
        files: name of a tensor -> the safetensors file that holds it.
        model: what the model is called whose weights they are: each is then checked to be finite as it is read.
    """

    def __init__(self, files: Mapping[str, Path], model: str = "") -> None:
        self._files = files
        self._model = model

    @classmethod
    def of(cls, files: Iterable[Path], model: str = "") -> Weights:
        """Find the tensors of some safetensors files."""
        return cls({name: file for file in files for name in _names(file)}, model)

    def __getitem__(self, name: str) -> Tensor:
        return self.read([name])[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read several tensors, mapping each file once; it stays mapped for as long as one of its tensors lives."""
        of_file: dict[Path, list[str]] = {}
        for name in names:
            of_file.setdefault(self._files[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, held in of_file.items():
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in held}
        if self._model:
            for name, tensor in tensors.items():
                check_finite(f"model {self._model}: {name}", tensor)
        return tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def index(self) -> str:
        """Write which file holds which tensor, as ``model.safetensors.index.json`` says it."""
        size = sum(self[name].nbytes for name in self)
        names = {name: file.name for name, file in sorted(self._files.items())}
        return json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=2) + "\n"


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def read_metadata(file: Path) -> dict[str, str]:
    """Read what a safetensors file says of itself."""
    with safe_open(file, framework="pt") as tensors:
        return dict(tensors.metadata() or {})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name beside its own, and rename it when all is on the disk.

    Args:
        path: the file to write; its folder is made.
        tensors: by name; of any device.
        metadata: what the file says of itself.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        _write_tensors(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise disk_error(path, error) from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=PARTIAL, dir=path.parent)
    temporary = Path(name)
    try:
        # As long as this process lives; ``remove_abandoned`` goes by it.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(held, temporary, metadata=dict(metadata))
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Remove what ``write_tensors`` had half-written in a folder when its process died."""
    for partial in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError), partial.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by what stands before the last slash of their names."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, leaf = name.rpartition("/")
        groups.setdefault(group, {})[leaf] = tensor
    return groups
