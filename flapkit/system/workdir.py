"""The work folder of an output: it exists beside the output until that is complete, and one process locks it.

For an output ``NAME`` it is called ``.NAME.work``. It holds a lock, partial files, and the records that an interrupted
run finished. With ``resume`` the next run uses these records; with ``overwrite`` it removes them and starts afresh;
with neither it stops with an error. The folder is removed when the output is complete.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from flapkit.system.errors import OutputError
from flapkit.system.json_files import read_object
from flapkit.system.processes import is_rank_zero

LOCK, SETTINGS = "lock", "settings.json"
PARTIAL, REPLACED = "partial", "replaced"
"""The folder of partial files; and the folder of the old output while the new one replaces it."""

OVERWRITE = "--overwrite"
"""How commands are told to overwrite; Python functions have an argument."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""Error numbers of file systems without locks."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers for no space: on the disk, in the user's quota, in one file."""

RENAME_EXCHANGE = 2
"""The flag of Linux's renameat2 that swaps two paths."""

log = logging.getLogger(__name__)


class WorkDir:
    """The work folder of an output, locked by this process, or by rank 0 of a distributed run.

    Args:
        output: the file or folder to write.
        resumed: use the records of an interrupted run.
    """

    def __init__(self, output: Path, *, resumed: bool = False) -> None:
        self.output = output
        self.folder = work_folder(output)
        self.resumed = resumed

    def path(self, name: str) -> Path:
        """Return the path of a record; it stays until the output is complete."""
        return self.folder / name

    def claim(self, inputs: Mapping[str, Any]) -> None:
        """Save what the work depends on beside its settings, such as hashes; a resumed run compares it.

        Args:
            inputs: JSON values by name.

        Raises:
            OutputError: the interrupted run had other inputs.
        """
        if is_rank_zero():
            self.save_identity("inputs", dict(inputs))

    def save_identity(self, key: str, value: dict[str, Any]) -> None:
        """Save what the work depends on, and compare it with what an interrupted run saved, if records are left."""
        path = self.folder / SETTINGS
        saved = read_object(path, OutputError) if path.is_file() else {}
        changes = differences(saved[key], value) if key in saved and self.records() else ()
        if changes:
            raise OutputError(
                f"output {self.output}: the interrupted run used a different recipe: {'; '.join(changes)}. "
                "Use the same recipe, or start again with --overwrite, or choose another output"
            )
        _write(path, json.dumps({**saved, key: value}, indent=2))

    def records(self) -> list[str]:
        """List the finished records; a name that starts with a dot is a partial file."""
        names = (path.name for path in self.folder.iterdir()) if self.folder.is_dir() else ()
        return sorted(name for name in names if name not in (LOCK, SETTINGS, PARTIAL, REPLACED) and name[0] != ".")

    @contextmanager
    def partial(self) -> Iterator[Path]:
        """Make a folder for partial files; it is removed when the context ends."""
        folder = self.folder / PARTIAL
        _remove(folder)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, finished: Path, path: Path) -> None:
        """Move a finished file or folder to its path; until then an old output at that path stays complete.

        Where the system supports it, the two are swapped, so that there is an output at every moment.

        Args:
            finished: a file or folder.
            path: its destination; of existing folders, only the output itself is allowed.
        """
        if path.is_dir() and exchange(finished, path):
            sync(path.parent)
            # `finished` is the old output now.
            _remove(finished)
        elif path.is_dir():
            # If the process is killed between the two renames, the next one that opens the work folder restores this.
            replaced = self.folder / REPLACED / path.name
            replaced.parent.mkdir()
            path.rename(replaced)
            try:
                finished.rename(path)
            except BaseException:
                replaced.rename(path)
                raise
            sync(path.parent)
            _remove(replaced.parent)
        else:
            finished.replace(path)
            sync(path.parent)

    def finish(self) -> None:
        """Remove all records: the output is complete."""
        for name in self.records() if is_rank_zero() else ():
            _remove(self.folder / name)


def work_folder(output: Path) -> Path:
    """Return the work folder of an output, the same for every spelling of the output's path."""
    output = output.expanduser().resolve()
    return output.with_name(f".{output.name}.work")


@contextmanager
def open_workdir(
    output: Path,
    settings: Mapping[str, Any] | None = None,
    *,
    check: Callable[[], None] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    option: str = OVERWRITE,
) -> Iterator[WorkDir]:
    """Lock the work folder of an output while it is written; of several processes, only rank 0 locks and cleans it.

    An old output that a killed process moved aside is restored, and partial files are removed.

    Args:
        output: the file or folder to write.
        settings: what defines the work, as JSON values; records made with other settings are not resumed.
        check: raises if the output may not be written; called after an old one is restored and before anything is
            removed.
        resume: use the records of an interrupted run.
        overwrite: without ``resume``: remove them.
        option: how the caller is told to overwrite.

    Raises:
        OutputError: another process holds the folder; the folder cannot be made; or it holds records, and neither
            ``resume`` nor ``overwrite`` is given, or they were made with other settings.
    """
    work = WorkDir(output.expanduser().resolve(), resumed=resume)
    for path in (output.expanduser(), work.folder):
        # The target of a link belongs to somebody else, and cleaning would remove files there.
        if path.is_symlink():
            raise OutputError(f"output {output}: {path} is a link; remove it, or choose another output")
    if not is_rank_zero():
        if check:
            check()
        yield work
        return
    with _locked(work):
        try:
            _clean(work)
            _refuse_records(work, option, overwrite=overwrite)
            if check:
                check()
            _resume_or_remove(work, dict(settings or {}))
        except OSError as error:
            raise disk_error(output, error) from error
        try:
            yield work
        except BaseException:
            if work.records():
                log.warning("finished work is in %s; --resume continues from it", work.folder)
            raise


@contextmanager
def _locked(work: WorkDir) -> Iterator[None]:
    """Lock the work folder; the system releases the lock of a process that dies."""
    made = [folder for folder in work.folder.parents if not folder.exists()]
    try:
        file = _lock(work)
    except OSError as error:
        raise disk_error(work.output, error) from error
    try:
        yield
    finally:
        if not work.records():
            _remove_folder(work, made)
        file.close()


def _lock(work: WorkDir) -> IO[str]:
    path = work.folder / LOCK
    while True:
        work.folder.mkdir(parents=True, exist_ok=True)
        # The process that held the lock may remove the folder at any of these moments: then make a new one.
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise OutputError(f"output {work.output}: {holder} is writing it and holds the lock {path}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            log.warning("%s: the file system has no locks; make sure that no other process writes this output", path)
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()


def _remove_folder(work: WorkDir, made: Sequence[Path]) -> None:
    """Remove the work folder, its lock last, and the parents that were made for it, if they are empty.

    A folder that another process uses by now is not empty, and stays.
    """
    for path in (work.folder / SETTINGS, *work.folder.glob(".*"), work.folder / LOCK):
        _remove(path)
    with suppress(OSError):
        for folder in (work.folder, *made):
            folder.rmdir()


def _clean(work: WorkDir) -> None:
    """Restore the old output if a killed process moved it aside, and remove partial files."""
    replaced = work.folder / REPLACED / work.output.name
    if replaced.exists() and not work.output.exists():
        replaced.rename(work.output)
        sync(work.output.parent)
        log.warning("%s: restored; an interrupted run had moved it aside", work.output)
    for path in (work.folder / REPLACED, work.folder / PARTIAL, *work.folder.glob(".*")):
        _remove(path)


def _refuse_records(work: WorkDir, option: str, *, overwrite: bool) -> None:
    if work.records() and not work.resumed and not overwrite:
        raise OutputError(
            f"output {work.output}: an interrupted run left finished work in {work.folder} "
            f"({', '.join(work.records())}); continue from it with --resume, or remove it with {option}"
        )


def _resume_or_remove(work: WorkDir, settings: dict[str, Any]) -> None:
    """Keep the records that are there, or remove them, and save the settings of the work."""
    records = ", ".join(work.records())
    if records and not work.resumed:
        work.finish()
        log.warning("%s: removed the finished work of an interrupted run: %s", work.folder, records)
    if not work.records():
        _remove(work.folder / SETTINGS)
    work.save_identity("settings", settings)
    if records and work.resumed:
        log.info("resuming from the finished work of an interrupted run: %s", records)


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """List by dotted key how two JSON values differ: ``budget.ratio: 0.2 then, 0.3 now``."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        nested = (differences(before.get(name), now.get(name), f"{key}.{name}".lstrip(".")) for name in keys)
        return [line for lines in nested for line in lines]
    return [] if before == now else [f"{key}: {json.dumps(before)} then, {json.dumps(now)} now"]


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically; an existing file is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        _write(path, content)
    except OSError as error:
        raise disk_error(path, error) from error


def _write(path: Path, content: str | bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    # A link at this path would be followed.
    partial.unlink(missing_ok=True)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; return whether that worked.

    Linux supports it on most local file systems (renameat2(2), RENAME_EXCHANGE). The reason of a failure is not
    reported: the caller then renames, and a real obstacle fails there too.

    Args:
        one: an absolute path.
        other: an absolute path on the same file system.
    """
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(0, bytes(one), 0, bytes(other), RENAME_EXCHANGE) == 0


def disk_error(path: Path, error: Exception, needed: int = 0) -> OutputError:
    """Make the error for an output that cannot be written; on a full disk, with the free and the needed space."""
    if getattr(error, "errno", None) in FULL or any(f"os error {code}" in str(error) for code in FULL):
        required = f", {_megabytes(needed)} needed" if needed else ""
        return OutputError(
            f"output {path}: the disk is full ({error}): {_megabytes(free_space(path))} free{required}; "
            "nothing was written"
        )
    return OutputError(f"output {path}: cannot be written: {error}")


@contextmanager
def damaged_as_output_error(path: Path) -> Iterator[None]:
    """Turn the errors of reading a record into one ``OutputError`` that names the file.

    Raises:
        OutputError: the file is damaged.
    """
    try:
        yield
    except (OSError, SafetensorError, ValueError, LookupError) as error:
        raise OutputError(
            f"{path}: this file of an interrupted run is damaged ({error}); remove it and --resume, "
            "or start again with --overwrite"
        ) from error


def check_space(path: Path, needed: int) -> None:
    """Raise ``OutputError`` unless the disk has room for an output beside the one that it replaces.

    Args:
        path: the output.
        needed: its size in bytes.
    """
    free = free_space(path)
    if needed > free:
        raise OutputError(
            f"output {path}: the disk has {_megabytes(free)} free, {_megabytes(needed)} needed; nothing was written"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def free_space(path: Path) -> int:
    """Return the free bytes on the disk of a path, which need not exist."""
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
