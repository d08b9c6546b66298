"""Paths that somebody else wrote: into a recipe, on the command line, or into a checkpoint."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from flapkit.system.errors import InputError


def to_path(text: Path | str, folder: Path | None = None) -> Path:
    """Turn what somebody wrote into a path, ``~`` expanded; there need be nothing at it.

    Args:
        text: the path.
        folder: what a relative one is relative to; the current directory if not given.

    Raises:
        InputError: the system can have nothing there: a NUL, a name that is too long, an unknown user, a folder that
            may not be entered.
    """
    try:
        path = (folder or Path()) / Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:
        shown = ascii(str(text) if len(str(text)) <= 60 else f"{str(text)[:60]}…")
        raise InputError(f"no such path can be reached: {shown}: {_reason(error)}") from error
    return path


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def within(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, or below it.

    Args:
        folder: the folder.
        name: what somebody else calls the file, as a relative path.

    Raises:
        InputError: the name leads out of the folder, or is none.
    """
    ways = (PurePosixPath(name), PureWindowsPath(name))
    if "\0" in name or not ways[0].parts or any(way.anchor or ".." in way.parts for way in ways):
        raise InputError(f"{name!r} is no name of a file in {folder}: it has to stay inside")
    return folder / name
