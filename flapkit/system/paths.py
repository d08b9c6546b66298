"""Check paths of unknown origin: from a recipe, the command line or a checkpoint; and find the cache."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from flapkit.system.errors import InputError

SQLITE = "sqlite:///"

OF_A_MACHINE = ("/", "~", "../", SQLITE + "/")
"""How a path begins that says where on a machine something is, unlike a hub id or a file beside the recipe."""

PATH_IN_TEXT = re.compile(r"(?<![\w.:/~-])(?:~|\.\.)?/(?:[^\s/'\"`,;:()]+/)+(?=[^\s/'\"`,;:()])")
"""The folders of a path in a sentence; a URL has none."""

PROMPTS = "prompts"
"""The key of text that is no path, however it begins."""


def name_only(text: str) -> str:
    """Return the last part of a path that says where on a machine something is, and other text as it is."""
    if not text.startswith(OF_A_MACHINE):
        return text
    return SQLITE * text.startswith(SQLITE) + PurePosixPath(text).name or text


def names_only(data: Any) -> Any:
    """Return JSON data with ``name_only`` of every text but prompts."""
    if isinstance(data, Mapping):
        return {key: value if key == PROMPTS else names_only(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [names_only(value) for value in data]
    return name_only(data) if isinstance(data, str) else data


def without_folders(sentence: str) -> str:
    """Return a sentence with the names of files alone where it has whole paths."""
    return PATH_IN_TEXT.sub("", sentence)


def to_path(text: Path | str, folder: Path | None = None) -> Path:
    """Turn text into a path, with ``~`` expanded; the path need not exist.

    Args:
        text: the path.
        folder: the base of a relative path; the current directory if not given.

    Raises:
        InputError: the system cannot reach the path: a NUL, too long a name, an unknown user, or a folder without
            permission.
    """
    try:
        path = (folder or Path()) / Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:
        shown = ascii(str(text) if len(str(text)) <= 60 else f"{str(text)[:60]}…")
        raise InputError(f"path {shown} cannot be used: {_reason(error)}") from error
    return path


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def within(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, or below it.

    Args:
        folder: the folder.
        name: the file's relative path, of unknown origin.

    Raises:
        InputError: the name is empty or leads out of the folder.
    """
    paths = (PurePosixPath(name), PureWindowsPath(name))
    if "\0" in name or not paths[0].parts or any(path.anchor or ".." in path.parts for path in paths):
        raise InputError(f"{name!r} is not a file name inside {folder}; use a relative path without '..'")
    return folder / name


def cache_folder() -> Path:
    """Return the cache folder: ``$FLAPKIT_CACHE``, or ``flapkit`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if chosen := os.environ.get("FLAPKIT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flapkit"
