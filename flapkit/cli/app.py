"""The application, its exit codes and its signals."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from flapkit.system.errors import FlapkitError, InputError
from flapkit.system.processes import is_rank_zero, rank

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes for Ctrl-C and SIGTERM, as in shells."""

PATIENCE = 5.0
"""Seconds that a process other than rank 0 waits for the others before it prints its error, or exits."""

GARBAGE_THRESHOLD = 10_000
"""New objects after which Python looks for cycles; with its 700, a tenth of the time of the imports goes to that."""

log = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"flapkit {version('flapkit')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Structured pruning of large language models without retraining."""


def main() -> None:
    """Run the command line.

    Exit codes: 0 for success, 1 if a run failed, 2 for wrong input, 130 for Ctrl-C, 143 for SIGTERM.
    """
    # The imports make a million objects that live as long as the process; at its end they are not worth a search.
    gc.set_threshold(GARBAGE_THRESHOLD)
    atexit.register(gc.freeze)
    # transformers and Lightning draw their own bars, and give advice about settings that flapkit makes.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parent = os.getppid()
    if not is_rank_zero():
        # One process for each device runs the command; only rank 0 prints the result.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    try:
        with _sigterm_stops():
            code = app(standalone_mode=False)
    except Terminated:
        _fail("interrupted; no output was written", TERMINATED, parent)
    except FlapkitError as error:
        log.debug("", exc_info=error)
        _fail(str(error), error.exit_code, parent)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except Exception as error:
        # Usage errors of click, which typer vendors or depends on.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(InputError.exit_code)
    # Without its standalone mode typer returns the exit codes of Ctrl-C and --help.
    if code == INTERRUPTED:
        _fail("interrupted; no output was written", INTERRUPTED, parent)


class Terminated(BaseException):
    """SIGTERM was received; handled like Ctrl-C."""


@contextmanager
def _sigterm_stops() -> Iterator[None]:
    """Make SIGTERM raise an exception, so that partial files are removed and locks released."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code for an error."""
    if isinstance(error, Terminated):
        return TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, FlapkitError) else FlapkitError.exit_code


def _fail(message: str, code: int, parent: int) -> None:
    """Print the error and exit.

    Rank 0 prints at once. The error of another process is probably the same, or that rank 0 exited: it waits to be
    ended by the launcher, and prints only if it is not.
    """
    if not is_rank_zero():
        if code in (INTERRUPTED, TERMINATED):
            sys.exit(code)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if os.getppid() != parent:
                sys.exit(code)
            time.sleep(0.1)
        message = f"process {rank()}: {message}"
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", markup=False)
    sys.exit(code)


def _end_after(parent: int) -> None:
    """Exit soon after the parent process does: on GPUs, NCCL might wait for it for half an hour."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(PATIENCE)
    os._exit(FlapkitError.exit_code)
