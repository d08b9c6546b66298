"""Write a folder as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from flapkit.system.errors import InputError, OutputError
from flapkit.system.paths import to_path
from flapkit.system.workdir import WorkDir, check_space, disk_error, open_workdir, sync

PLAN = "plan.json"
"""The file that holds a checkpoint's plan."""

MARK = "flapkit.json"
"""The file by which a folder is known to be flapkit's own, so that it may be overwritten."""


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Raise ``OutputError`` unless a folder can be written: checked before a run, so that no work is lost.

    Args:
        path: the folder to write.
        overwrite: it may replace a folder that flapkit wrote, or an empty one.
    """
    _check_reach(path)
    if path.exists() or path.is_symlink():
        if not path.is_dir() or path.is_symlink():
            raise OutputError(f"output {path}: exists and is no folder; choose another")
        if not overwrite:
            raise OutputError(f"output {path}: exists already; choose another folder, or give --overwrite")
        if not (path / MARK).is_file() and any(path.iterdir()):
            raise OutputError(f"output {path}: was not written by flapkit (it holds no {MARK}); remove it yourself")
    _check_parent(path)


def _check_reach(path: Path) -> None:
    try:
        to_path(path)
    except InputError as error:
        raise OutputError(f"output: {error}") from error


def _check_parent(path: Path) -> None:
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"output {path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {path}: {parent} cannot be written; choose another folder")


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False, work: WorkDir | None = None, needed: int = 0) -> Iterator[Path]:
    """Write a folder in the work folder beside it, and rename it when all is written.

    Whatever stops the writing, the folder is then either as it was before or complete.

    Args:
        path: the folder to write.
        overwrite: replace a folder that flapkit wrote.
        work: the work folder, where it is held already.
        needed: the bytes that will be written, as far as they are known: without room for them nothing is.

    Yields:
        The temporary folder to write to.

    Raises:
        OutputError: the folder exists, cannot be written, another process writes it, or the disk is full.
    """
    with _new(path, check_output, overwrite, work, needed) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a file in the work folder beside it, and rename it when all is written.

    Args:
        path: the file to write.
        overwrite: replace a file.

    Yields:
        The temporary file to write, which is not there yet.

    Raises:
        OutputError: the file exists, cannot be written, another process writes it, or the disk is full.
    """
    with _new(path, check_output_file, overwrite, None) as temporary:
        yield temporary


@contextmanager
def _new(
    path: Path, check: Callable[..., None], overwrite: bool, work: WorkDir | None, needed: int = 0
) -> Iterator[Path]:
    allowed = partial(check, path, overwrite=overwrite)
    with nullcontext(work) if work else open_workdir(path, check=allowed, overwrite=overwrite) as work:
        allowed()
        check_space(path, needed)
        try:
            with work.partial() as half:
                temporary = half / path.absolute().name
                yield temporary
                _sync(half)
                _open_up(half)
                work.put(temporary, path.absolute())
        except (OSError, SafetensorError) as error:
            raise disk_error(path, error, needed) from error


def check_output_file(path: Path, *, overwrite: bool = False) -> None:
    """Raise ``OutputError`` unless a file can be written.

    Args:
        path: the file to write.
        overwrite: it may replace a file.
    """
    _check_reach(path)
    if path.is_dir() or path.is_symlink():
        raise OutputError(f"output {path}: exists and is no file; choose another")
    if path.exists() and not overwrite:
        raise OutputError(f"output {path}: exists already; choose another file, or give --overwrite")
    _check_parent(path)


def _open_up(folder: Path) -> None:
    """Give the usual permissions: safetensors makes what only its owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _sync(folder: Path) -> None:
    """Have the system write everything to the disk, so that the rename cannot overtake it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
