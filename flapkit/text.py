"""Where text comes from: named datasets, hub ids, local files and folders, all as lists of documents."""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
_STDLIB_HELD_OUT_ONE_IN = 10


def stdlib_modules() -> dict[str, list[Path]]:
    """Map each top-level module of Python's standard library to its source files, in a fixed order.

    Tests, generated tables (``encodings``, ``pydoc_data``, ``_sysconfigdata*``) and installed packages are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _STDLIB_SKIPPED.intersection(parts) or parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        modules.setdefault(parts[0].removesuffix(".py"), []).append(path)
    return modules


def is_held_out(module: str) -> bool:
    """Tell whether a standard-library module belongs to the held-out split: one in ten, by a hash of its name."""
    return zlib.crc32(module.encode()) % _STDLIB_HELD_OUT_ONE_IN == 0


def stdlib_documents(split: str) -> list[str]:
    """Read the sources of Python's standard library.

    Args:
        split: ``train``, or ``heldout`` (the modules that no training or calibration text comes from).

    Returns:
        One document per source file.
    """
    return [
        path.read_text(encoding="utf-8")
        for module, paths in sorted(stdlib_modules().items())
        if is_held_out(module) == (split == "heldout")
        for path in paths
    ]
