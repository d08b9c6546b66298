"""The command line's frame: the application, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from flapkit.system.errors import FlapkitError, InputError
from flapkit.system.processes import is_rank_zero, rank

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of Ctrl-C and of SIGTERM, as shells have them."""

PATIENCE = 5.0
"""Seconds that a process which is not the first gives to the others before it speaks, or ends, by itself."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
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

    Exit code 0, 1 where a run failed, 2 where the input was wrong, 130 for Ctrl-C, 143 for SIGTERM.
    """
    # transformers and Lightning draw their own bars and give advice on what flapkit decides.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parent = os.getppid()
    if not is_rank_zero():
        # The command is started once for each device; the first alone prints what it found.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    try:
        with _sigterm_stops():
            code = app(standalone_mode=False)
    except Terminated:
        _fail("stopped; no output was written", TERMINATED, parent)
    except FlapkitError as error:
        _fail(str(error), error.exit_code, parent)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except Exception as error:
        # typer brings along, or depends on, the click whose usage errors these are.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(InputError.exit_code)
    # Without its standalone mode typer returns the code of Ctrl-C and of --help.
    if code == INTERRUPTED:
        _fail("stopped; no output was written", INTERRUPTED, parent)


class Terminated(BaseException):
    """SIGTERM was received: all is left as on Ctrl-C."""


@contextmanager
def _sigterm_stops() -> Iterator[None]:
    """Have SIGTERM end the work as an exception does, which leaves nothing half-written and frees what is held."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of what ended a command."""
    if isinstance(error, Terminated):
        return TERMINATED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, FlapkitError) else FlapkitError.exit_code


def _fail(message: str, code: int, parent: int) -> None:
    """Say what ended the command, and end it.

    Of several processes the first speaks at once. What another has to say is probably the same, or that the first is
    gone: it waits to be ended by whoever started it, and speaks if it is not.
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
    """End this process soon after the one that started it: on GPUs it might wait for it for half an hour."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(PATIENCE)
    os._exit(FlapkitError.exit_code)
