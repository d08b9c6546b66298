"""Whether the modeling file of a checkpoint is the one that was written with its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flapkit.checkpoint.folder import MARK
from flapkit.system.errors import ModelError
from flapkit.system.json_files import read_object

ENTRY = "modeling"
"""The entry of ``flapkit.json``: the modeling file's name -> its SHA-256."""

ADVICE = "transformers may run it: do not load the folder with trust_remote_code=True, and get it again from its source"


def sha256_of(source: str) -> str:
    """Return the SHA-256 of a file's text, as ``sha256sum`` prints it."""
    return hashlib.sha256(source.encode()).hexdigest()


def check_modeling_file(name: Path | str, folder: Path) -> None:
    """Raise ``ModelError`` if the code in a folder is not that which flapkit wrote.

    flapkit runs none of it; whoever gets the folder may. A folder without ``flapkit.json``, or without its entry, has
    nothing to compare with, and is not checked.

    Args:
        name: the checkpoint's name.
        folder: its folder.
    """
    if not (folder / MARK).is_file():
        return
    expected: Any = read_object(folder / MARK, ModelError).get(ENTRY)
    if expected is None:
        return
    if not isinstance(expected, dict):
        raise ModelError(f"model {name}: {MARK}: {ENTRY} is damaged: expected the modeling file's name and its SHA-256")
    for file in _named(read_object(folder / "config.json", ModelError)):
        if file not in expected:
            raise ModelError(
                f"model {name}: auto_map in config.json names {file}, which flapkit did not write; {ADVICE}"
            )
        try:
            digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        except OSError as error:
            raise ModelError(f"model {name}: {file} cannot be read: {error.strerror or error}") from error
        if digest != expected[file]:
            raise ModelError(f"model {name}: {file} was changed: its SHA-256 is not the one in {MARK}; {ADVICE}")


def _named(config: Mapping[str, Any]) -> list[str]:
    """List the files of code that a configuration names, as transformers reads ``auto_map``."""
    named = config.get("auto_map")
    classes = named.values() if isinstance(named, dict) else () if named is None else (named,)
    return sorted({f"{str(of).rpartition('.')[0]}.py" for of in classes})
