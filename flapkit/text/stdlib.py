"""The sources of Python's standard library as text: on every machine, without a network."""

from __future__ import annotations

import os
import sysconfig
import zlib
from functools import cache
from pathlib import Path

_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
_HELD_OUT_ONE_IN = 10


@cache
def stdlib_modules() -> dict[str, list[Path]]:
    """Map each top-level module of Python's standard library to its source files, in a fixed order.

    Tests, generated tables (``encodings``, ``pydoc_data``, ``_sysconfigdata*``) and installed packages are excluded.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules: dict[str, list[Path]] = {}
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        # Not entered at all: installed packages are many.
        folders[:] = [name for name in folders if name not in _SKIPPED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(files):
        parts = path.relative_to(root).parts
        if parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        modules.setdefault(parts[0].removesuffix(".py"), []).append(path)
    return modules


def is_held_out(module: str) -> bool:
    """Return whether a standard-library module is in the held-out split: one in ten, by a hash of its name."""
    return zlib.crc32(module.encode()) % _HELD_OUT_ONE_IN == 0


def stdlib_documents(split: str) -> list[str]:
    """Read the sources of Python's standard library.

    Args:
        split: ``train``, or ``heldout`` (modules not used for training or calibration).

    Returns:
        One document per source file.
    """
    return [path.read_text(encoding="utf-8") for path in stdlib_files(split)]


def stdlib_files(split: str) -> list[Path]:
    """List the source files of a split of the standard library, by module."""
    modules = sorted(stdlib_modules().items())
    return [path for module, paths in modules if is_held_out(module) == (split == "heldout") for path in paths]
