"""Write a folder as a whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from flapkit.errors import OutputError

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
    if path.exists() or path.is_symlink():
        if not path.is_dir() or path.is_symlink():
            raise OutputError(f"output {path}: exists and is no folder; choose another")
        if not overwrite:
            raise OutputError(f"output {path}: exists already; choose another folder, or give --overwrite")
        if not (path / MARK).is_file() and any(path.iterdir()):
            raise OutputError(f"output {path}: was not written by flapkit (it holds no {MARK}); remove it yourself")
    _check_parent(path)


def _check_parent(path: Path) -> None:
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"output {path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {path}: {parent} cannot be written; choose another folder")


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder under a temporary name beside its own, and rename it when all is written.

    Whatever stops the writing, the folder is then either as it was before or complete.

    Args:
        path: the folder to write.
        overwrite: replace a folder that flapkit wrote.

    Yields:
        The temporary folder to write to.

    Raises:
        OutputError: the folder exists, cannot be written, or the disk is full.
    """
    check_output(path, overwrite=overwrite)
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise _failure(path, error) from error
    try:
        yield temporary
        _sync(temporary)
        _open_up(temporary)
        _put(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _failure(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a file under a temporary name beside its own, and rename it when all is written.

    Args:
        path: the file to write.
        overwrite: replace a file.

    Yields:
        The temporary file to write, which is not there yet.

    Raises:
        OutputError: the file exists, cannot be written, or the disk is full.
    """
    check_output_file(path, overwrite=overwrite)
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise _failure(path, error) from error
    try:
        yield folder / path.name
        _sync(folder)
        _open_up(folder)
        (folder / path.name).replace(path)
    except (OSError, SafetensorError) as error:
        raise _failure(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_output_file(path: Path, *, overwrite: bool = False) -> None:
    """Raise ``OutputError`` unless a file can be written.

    Args:
        path: the file to write.
        overwrite: it may replace a file.
    """
    if path.is_dir() or path.is_symlink():
        raise OutputError(f"output {path}: exists and is no file; choose another")
    if path.exists() and not overwrite:
        raise OutputError(f"output {path}: exists already; choose another file, or give --overwrite")
    _check_parent(path)


def _open_up(folder: Path) -> None:
    """Give the usual permissions: mkdtemp and safetensors make what only its owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _sync(folder: Path) -> None:
    """Have the system write everything to the disk, so that the rename cannot overtake it."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    replaced = path.with_name(f"{temporary.name.removesuffix('.partial')}.replaced")
    path.rename(replaced)
    try:
        temporary.rename(path)
    except BaseException:
        replaced.rename(path)
        raise
    shutil.rmtree(replaced)


def _failure(path: Path, error: OSError | SafetensorError) -> OutputError:
    if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
        return OutputError(f"output {path}: the disk is full ({free / 1e6:,.0f} MB are free); nothing was written")
    return OutputError(f"output {path}: cannot be written: {error}")
