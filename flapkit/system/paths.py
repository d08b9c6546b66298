"""Check paths of unknown origin: from a recipe, the command line or a checkpoint; and find the cache."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from flapkit.system.errors import InputError


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
