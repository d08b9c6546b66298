"""The work folder of an output: it stands beside the output while that is not complete, and one process holds it.

For an output ``NAME`` it is called ``.NAME.work``. In it are a lock, what is half-written, and what a run that was
stopped has finished: another run goes on with that if it is told to (``resume``), and removes it if it is told to begin
anew (``overwrite``); nothing of it is lost without that. The folder goes away when the output is complete.
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

LOCK, ASKED = "lock", "asked.json"
HALF, REPLACED = "half", "replaced"
"""What is half-written; and the old output, for the moment in which the new one takes its place."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""How file systems say that they know no locks."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How the system says that there is no room: on the disk, in the user's quota, in a file."""

RENAME_EXCHANGE = 2
"""The flag of Linux's renameat2 by which two paths change places."""

log = logging.getLogger(__name__)


class WorkDir:
    """The work folder of an output, held by this process, or by the first of those that share the work.

    Args:
        output: the file or folder that is to be written.
        resumed: what a stopped run has finished is gone on with.
    """

    def __init__(self, output: Path, *, resumed: bool = False) -> None:
        self.output = output
        self.folder = work_folder(output)
        self.resumed = resumed

    def path(self, name: str) -> Path:
        """Return where a finished piece of the work is, or is to be put; it stays until the output is complete."""
        return self.folder / name

    def claim(self, found: Mapping[str, Any]) -> None:
        """Note what the work turned out to depend on beside what was asked; for a run that goes on, check it.

        Args:
            found: by name, as JSON holds it.

        Raises:
            OutputError: a stopped run had found something else.
        """
        if is_rank_zero():
            self.note("found", dict(found))

    def note(self, kind: str, now: dict[str, Any]) -> None:
        """Note what the work depends on, and compare it with what a stopped run has noted, if pieces of it are left."""
        mark = self.folder / ASKED
        noted = read_object(mark, OutputError) if mark.is_file() else {}
        changes = differences(noted[kind], now) if kind in noted and self.pieces() else ()
        if changes:
            raise OutputError(
                f"output {self.output}: the run that was stopped was another: {'; '.join(changes)}. "
                "Ask for the same again, or begin anew with --overwrite, or choose another output"
            )
        _write(mark, json.dumps({**noted, kind: now}, indent=2))

    def pieces(self) -> list[str]:
        """List what is finished; whatever has a name with a dot in front is not."""
        names = (path.name for path in self.folder.iterdir()) if self.folder.is_dir() else ()
        return sorted(name for name in names if name not in (LOCK, ASKED, HALF, REPLACED) and name[0] != ".")

    @contextmanager
    def half_written(self) -> Iterator[Path]:
        """Make a folder for what is half-written; nothing in it outlives the context."""
        half = self.folder / HALF
        _remove(half)
        half.mkdir()
        try:
            yield half
        finally:
            shutil.rmtree(half, ignore_errors=True)

    def put(self, finished: Path, path: Path) -> None:
        """Rename what was half-written to its place; the output that was there before is whole until then.

        Where the system can, there is no moment without an output.

        Args:
            finished: a file or folder.
            path: its place; only the output itself may be there already as a folder.
        """
        if path.is_dir() and exchange(finished, path):
            sync(path.parent)
            # That is the old output now.
            _remove(finished)
        elif path.is_dir():
            # Killed between the two renames, the old output is here, and the next to open the work puts it back.
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
        """Remove all pieces: the output is complete."""
        for name in self.pieces() if is_rank_zero() else ():
            _remove(self.folder / name)


def work_folder(output: Path) -> Path:
    """Return the work folder of an output, the same however the output's path is spelt."""
    output = output.expanduser().resolve()
    return output.with_name(f".{output.name}.work")


@contextmanager
def open_workdir(
    output: Path,
    asked: Mapping[str, Any] | None = None,
    *,
    check: Callable[[], None] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Iterator[WorkDir]:
    """Hold the work folder of an output while it is made. Of several processes, the first alone holds and tidies it.

    An old output that a kill has left aside is put back, and what is half-written is removed.

    Args:
        output: the file or folder that is to be written.
        asked: what the work is to be, as JSON holds it; what was finished for something else is not gone on with.
        check: raises if the output may not be written; called when an old one is in its place, and nothing is removed.
        resume: go on with what a stopped run has finished.
        overwrite: without ``resume``: remove it.

    Raises:
        OutputError: another process holds the folder; it cannot be made; or it holds finished work, and neither
            ``resume`` nor ``overwrite`` says what is to become of it, or it was finished for something else.
    """
    work = WorkDir(output.expanduser().resolve(), resumed=resume)
    for path in (output.expanduser(), work.folder):
        # Whatever a link leads to is somebody else's, and what is half-written would be removed there.
        if path.is_symlink():
            raise OutputError(f"output {output}: {path} is a link; remove it, or choose another output")
    if not is_rank_zero():
        if check:
            check()
        yield work
        return
    with _locked(work):
        try:
            _tidy(work)
            _refuse_leftovers(work, overwrite=overwrite)
            if check:
                check()
            _settle(work, dict(asked or {}))
        except OSError as error:
            raise disk_error(output, error) from error
        try:
            yield work
        except BaseException:
            if work.pieces():
                log.warning("what is finished is in %s; --resume goes on with it", work.folder)
            raise


@contextmanager
def _locked(work: WorkDir) -> Iterator[None]:
    """Lock the work folder; the system takes the lock away from a process that dies."""
    made = [folder for folder in work.folder.parents if not folder.exists()]
    try:
        file = _lock(work)
    except OSError as error:
        raise disk_error(work.output, error) from error
    try:
        yield
    finally:
        if not work.pieces():
            _dissolve(work, made)
        file.close()


def _lock(work: WorkDir) -> IO[str]:
    path = work.folder / LOCK
    while True:
        work.folder.mkdir(parents=True, exist_ok=True)
        # The one who held the lock may remove the folder at any of these moments: then there is a new one to make.
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
            raise OutputError(f"output {work.output}: {holder} is writing it, and holds {path}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                file.close()
                raise
            log.warning("%s: the file system knows no locks; take care that nobody else writes the output", path)
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()


def _dissolve(work: WorkDir, made: Sequence[Path]) -> None:
    """Remove the folder, the lock last, and those above it that were made for it and hold nothing else.

    If somebody else takes a folder meanwhile, it is theirs.
    """
    for path in (work.folder / ASKED, *work.folder.glob(".*"), work.folder / LOCK):
        _remove(path)
    with suppress(OSError):
        for folder in (work.folder, *made):
            folder.rmdir()


def _tidy(work: WorkDir) -> None:
    """Put back the old output if a kill has left it aside, and remove what is half-written."""
    replaced = work.folder / REPLACED / work.output.name
    if replaced.exists() and not work.output.exists():
        replaced.rename(work.output)
        sync(work.output.parent)
        log.warning("%s: a stopped run had set it aside; it is put back", work.output)
    for path in (work.folder / REPLACED, work.folder / HALF, *work.folder.glob(".*")):
        _remove(path)


def _refuse_leftovers(work: WorkDir, *, overwrite: bool) -> None:
    if work.pieces() and not work.resumed and not overwrite:
        raise OutputError(
            f"output {work.output}: a run that was stopped has left its work in {work.folder} "
            f"({', '.join(work.pieces())}); --resume goes on with it, --overwrite removes it and begins anew"
        )


def _settle(work: WorkDir, asked: dict[str, Any]) -> None:
    """Go on with the pieces that are there, or remove them, and note what the work is to be."""
    pieces = ", ".join(work.pieces())
    if pieces and not work.resumed:
        work.finish()
        log.warning("%s: what a stopped run had finished is removed: %s", work.folder, pieces)
    if not work.pieces():
        _remove(work.folder / ASKED)
    work.note("asked", asked)
    if pieces and work.resumed:
        log.info("going on with what a stopped run has left: %s", pieces)


def differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Say by dotted keys how what was asked for differs from what is asked for now."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        deeper = (differences(before.get(each), now.get(each), f"{key}.{each}".lstrip(".")) for each in keys)
        return [line for lines in deeper for line in lines]
    return [] if before == now else [f"{key}: {json.dumps(before)} then, {json.dumps(now)} now"]


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; one that is there is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        _write(path, content)
    except OSError as error:
        raise disk_error(path, error) from error


def _write(path: Path, content: str | bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    # A link that somebody left there would be followed.
    partial.unlink(missing_ok=True)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; tell whether that was done.

    Linux can, on most local file systems (renameat2(2), RENAME_EXCHANGE). Nothing else is told of: whatever keeps the
    system from it, the renames that are tried instead meet it as well.

    Args:
        one: absolute, as the other.
        other: on the same file system.
    """
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(0, bytes(one), 0, bytes(other), RENAME_EXCHANGE) == 0


def disk_error(path: Path, error: Exception, needed: int = 0) -> OutputError:
    """Say why an output cannot be written: where there is no room, how much is free, and how much was needed."""
    if getattr(error, "errno", None) in FULL or any(f"os error {code}" in str(error) for code in FULL):
        wanted = f", {_megabytes(needed)} are needed" if needed else ""
        return OutputError(
            f"output {path}: the disk is full ({error}): {_megabytes(free_space(path))} are free{wanted}; "
            "nothing of it was written"
        )
    return OutputError(f"output {path}: cannot be written: {error}")


@contextmanager
def damaged_as_output_error(path: Path) -> Iterator[None]:
    """Read what a stopped run has left in a file; what shows that it is damaged is one error that names it.

    Raises:
        OutputError: something else was in the file than was written.
    """
    try:
        yield
    except (OSError, SafetensorError, ValueError, LookupError) as error:
        raise OutputError(
            f"{path}: what a stopped run has left there is damaged ({error}); remove it, and --resume makes it anew; "
            "or begin anew with --overwrite"
        ) from error


def check_space(path: Path, needed: int) -> None:
    """Raise ``OutputError`` unless a disk has room for an output; what it replaces stays until it is whole.

    Args:
        path: the output.
        needed: its bytes.
    """
    free = free_space(path)
    if needed > free:
        raise OutputError(
            f"output {path}: {_megabytes(needed)} are needed, and {_megabytes(free)} are free on its disk; "
            "nothing of it was written"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def free_space(path: Path) -> int:
    """Return the bytes that are free where a path is, or will be."""
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
