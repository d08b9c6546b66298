"""Write a folder or a file as a whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from flapkit.system.errors import InputError, OutputError
from flapkit.system.paths import to_path
from flapkit.system.workdir import OVERWRITE, WorkDir, check_space, disk_error, open_workdir, sync

PLAN = "plan.json"
"""The file of a checkpoint's plan."""

RECIPE = "recipe.yaml"
"""The recipe that made a checkpoint, without folders of the machine where it ran."""

LOCAL_RECIPE = "recipe.local.yaml"
"""The same with its folders, if it has any; never published."""

MARK = "flapkit.json"
"""The file that marks a folder as written by flapkit, so that it may be overwritten."""

LAYERS = "layers"
"""The entry of ``MARK``: layer -> the heads and widths kept, of the dense model's."""

PARAMETERS = "parameters"
"""The key of the parameters of a layer's attention and MLP in there."""


def recipe_of(checkpoint: Path) -> Path:
    """Return the file of the recipe that made a checkpoint: with the folders of this machine, if it was made here."""
    local = checkpoint / LOCAL_RECIPE
    return local if local.is_file() else checkpoint / RECIPE


def check_output(path: Path, *, overwrite: bool = False, option: str = OVERWRITE) -> None:
    """Raise ``OutputError`` unless a folder can be written; called before a run, so that no work is lost.

    Args:
        path: the folder to write.
        overwrite: allow replacing a folder that flapkit wrote, or an empty one.
        option: how the caller is told to overwrite.
    """
    _check_path(path)
    if path.exists() or path.is_symlink():
        if not path.is_dir() or path.is_symlink():
            raise OutputError(f"output {path}: exists and is not a folder; choose another path")
        if not overwrite:
            raise OutputError(f"output {path}: exists already; choose another folder, or use {option}")
        if not (path / MARK).is_file() and any(path.iterdir()):
            raise OutputError(f"output {path}: was not written by flapkit ({MARK} is missing); remove it yourself")
    _check_parent(path)


def _check_path(path: Path) -> None:
    try:
        to_path(path)
    except InputError as error:
        raise OutputError(f"output: {error}") from error


def _check_parent(path: Path) -> None:
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"output {path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {path}: {parent} is not writable; choose another folder")


@contextmanager
def new_folder(
    path: Path, *, overwrite: bool = False, work: WorkDir | None = None, needed: int = 0, option: str = OVERWRITE
) -> Iterator[Path]:
    """Write a folder in the work folder beside it, and rename it when it is complete.

    If writing is interrupted, the folder is either unchanged or complete.

    Args:
        path: the folder to write.
        overwrite: replace a folder that flapkit wrote.
        work: the work folder, if it is already open.
        needed: bytes to be written, as far as known; checked against the free space first.
        option: how the caller is told to overwrite.

    Yields:
        The temporary folder to write to.

    Raises:
        OutputError: the folder exists, cannot be written, another process writes it, or the disk is full.
    """
    with _new(path, partial(check_output, option=option), overwrite, work, needed, option) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a file in the work folder beside it, and rename it when it is complete.

    Args:
        path: the file to write.
        overwrite: replace an existing file.

    Yields:
        The path of the temporary file to write.

    Raises:
        OutputError: the file exists, cannot be written, another process writes it, or the disk is full.
    """
    with _new(path, check_output_file, overwrite, None) as temporary:
        yield temporary


@contextmanager
def _new(
    path: Path,
    check: Callable[..., None],
    overwrite: bool,
    work: WorkDir | None,
    needed: int = 0,
    option: str = OVERWRITE,
) -> Iterator[Path]:
    allowed = partial(check, path, overwrite=overwrite)
    own = nullcontext(work) if work else open_workdir(path, check=allowed, overwrite=overwrite, option=option)
    with own as work:
        allowed()
        check_space(path, needed)
        try:
            with work.partial() as folder:
                temporary = folder / path.absolute().name
                yield temporary
                _sync(folder)
                _set_default_permissions(folder)
                work.put(temporary, path.absolute())
        except (OSError, SafetensorError) as error:
            raise disk_error(path, error, needed) from error


def check_output_file(path: Path, *, overwrite: bool = False) -> None:
    """Raise ``OutputError`` unless a file can be written.

    Args:
        path: the file to write.
        overwrite: allow replacing an existing file.
    """
    _check_path(path)
    if path.is_dir() or path.is_symlink():
        raise OutputError(f"output {path}: exists and is not a file; choose another path")
    if path.exists() and not overwrite:
        raise OutputError(f"output {path}: exists already; choose another file, or use --overwrite")
    _check_parent(path)


def _set_default_permissions(folder: Path) -> None:
    """Apply the umask's permissions: safetensors writes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [*folder.rglob("*"), folder]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _sync(folder: Path) -> None:
    """Flush everything to the disk, so that the rename does not come first."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
