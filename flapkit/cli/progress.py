"""How commands show progress: bars on a terminal, plain lines elsewhere, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from flapkit.cli.app import exit_code_of
from flapkit.system.processes import is_rank_zero
from flapkit.system.progress import Event, Listener, duration

if TYPE_CHECKING:
    from rich.progress import TaskID

PLAIN_SECONDS = 10.0
"""Seconds between two lines of a long stage, if stderr is not a terminal."""

JSON_SECONDS = 0.2
"""Seconds between two progress events of a stage, so that a quick stage does not flood the reader."""


def progress_listener(*, quiet: bool) -> Listener:
    """Choose how a command shows progress on stderr: not at all, as bars on a terminal, else as plain lines."""
    if quiet or not is_rank_zero():
        return lambda event: None
    return Bars(Console(stderr=True)) if sys.stderr.isatty() else PlainLines(sys.stderr)


class Bars:
    """A bar with the time left for each running stage, and a line for each finished one.

    Args:
        console: where they are shown.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

        self._console = console
        self._bars = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        """Show an event."""
        if event.kind == "started":
            self._bars.start()
            self._tasks[event.stage] = self._bars.add_task(event.stage, total=event.total, amount=_amount(event))
        elif event.kind == "progress":
            self._bars.update(self._tasks[event.stage], completed=event.done, amount=_amount(event))
        else:
            self._end(event)

    def _end(self, event: Event) -> None:
        self._bars.remove_task(self._tasks.pop(event.stage))
        if event.kind == "finished":
            self._console.print(_finished(event), highlight=False)
        if not self._tasks:
            self._bars.stop()


class PlainLines:
    """A line for each finished stage, and for a long one a line every few seconds.

    Args:
        stream: where they are written.
        clock: returns the time in seconds.
    """

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._limit = _Limit(PLAIN_SECONDS, clock)

    def __call__(self, event: Event) -> None:
        """Write the line of an event, if there is one."""
        if event.kind == "started":
            self._limit.restart(event.stage)
        elif event.kind == "finished":
            self._write(_finished(event))
        elif event.kind == "progress" and self._limit.allows(event.stage):
            left = "" if event.seconds_left is None else f", about {duration(event.seconds_left)} left"
            self._write(f"{event.stage}: {_amount(event)}{left}")

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


class JsonLines:
    """Events as JSON objects, one a line: ``started``, ``progress``, ``finished``, ``stopped``; ``result``, ``error``.

    Args:
        stream: where they are written.
        clock: returns the time in seconds.
    """

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._limit = _Limit(JSON_SECONDS, clock)

    def __call__(self, event: Event) -> None:
        """Write an event of a stage."""
        if event.kind == "progress" and event.done != event.total and not self._limit.allows(event.stage):
            return
        fields: dict[str, Any] = {"stage": event.stage, "seconds": event.seconds}
        if event.total is not None:
            fields |= {"done": event.done, "total": event.total, "unit": event.unit}
        if event.kind == "progress" and event.seconds_left is not None:
            fields["seconds_left"] = round(event.seconds_left, 3)
        self.write(event.kind, **fields)

    def write(self, kind: str, /, **fields: Any) -> None:
        """Write an event of any kind; numbers that are not finite become null, because JSON has none."""
        self._stream.write(json.dumps({"event": kind, **_finite(fields)}, ensure_ascii=False, default=str) + "\n")
        self._stream.flush()

    def error(self, error: BaseException) -> None:
        """Write the event of the error that ended the command."""
        message = str(error) or "interrupted"
        self.write("error", kind=type(error).__name__, message=message, exit_code=exit_code_of(error))


@contextmanager
def json_lines(stream: IO[str]) -> Iterator[JsonLines]:
    """Write only JSON lines to a stream while a command works; an error is the last of them."""
    lines = JsonLines(stream)
    try:
        # Libraries must not print between the lines.
        with redirect_stdout(sys.stderr):
            yield lines
    except BaseException as error:
        lines.error(error)
        raise


class _Limit:
    """Lets something through at most once in a number of seconds, by name."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._last: dict[str, float] = {}

    def restart(self, name: str) -> None:
        self._last[name] = self._clock()

    def allows(self, name: str) -> bool:
        now = self._clock()
        if now - self._last.get(name, -self._seconds) < self._seconds:
            return False
        self._last[name] = now
        return True


def _amount(event: Event) -> str:
    if event.total is None:
        return ""
    return f"{event.done:,} of {event.total:,} {event.unit}".rstrip()


def _finished(event: Event) -> str:
    work = "" if event.total is None else f"{event.total:,} {event.unit}".rstrip() + " in "
    return f"{event.stage}: {work}{duration(event.seconds)}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
