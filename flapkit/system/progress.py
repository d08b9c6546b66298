"""Progress of a run: stages send events, listeners show them.

```python
progress = Progress(print)
with progress.stage("calibrate", total=256, unit="windows") as stage:
    for batch in batches:
        ...
        stage.advance(len(batch))
progress.seconds  # {"calibrate": 3.2}
```
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a stage.

    Args:
        kind: ``started``, ``progress``, ``finished``, or ``stopped`` if an exception ended the stage.
        stage: the stage's name.
        done: finished work, in ``unit``.
        total: all work, in ``unit``; None if unknown.
        unit: what the work is counted in, for example ``windows``.
        seconds: wall time since the stage started.
    """

    kind: Literal["started", "progress", "finished", "stopped"]
    stage: str
    done: int = 0
    total: int | None = None
    unit: str = ""
    seconds: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest will take at the speed so far; None if unknown."""
        if not self.total or not self.done:
            return None
        return self.seconds * max(self.total - self.done, 0) / self.done


Listener = Callable[[Event], None]
"""Shows events; called in the working thread, so it must be quick."""


class Stage:
    """A running stage; made by ``Progress.stage``."""

    def __init__(self, emit: Listener, name: str, total: int | None, unit: str, clock: Callable[[], float]) -> None:
        self._emit = emit
        self._clock = clock
        self._start = clock()
        self.name = name
        self.total = total
        self.unit = unit
        self.done = 0

    def advance(self, amount: int = 1) -> None:
        """Add finished work, in the stage's unit."""
        self.done += amount
        self.emit("progress")

    def emit(self, kind: Literal["started", "progress", "finished", "stopped"]) -> None:
        """Send an event to the listeners."""
        self._emit(Event(kind, self.name, self.done, self.total, self.unit, self.seconds))

    @property
    def seconds(self) -> float:
        """Wall time since the stage started."""
        return round(self._clock() - self._start, 3)


class Progress:
    """The stages of one run, and the listeners that show them.

    Args:
        listeners: show the events; none for silence.
        clock: returns the time in seconds.

    Attributes:
        seconds: stage -> wall time of the finished stages; stages of the same name add up.
    """

    def __init__(self, *listeners: Listener, clock: Callable[[], float] = time.perf_counter) -> None:
        self._listeners = listeners
        self._clock = clock
        self._begin = clock()
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Wall time since this object was made, with all that is not a stage."""
        return round(self._clock() - self._begin, 3)

    def emit(self, event: Event) -> None:
        """Pass an event to every listener."""
        for listener in self._listeners:
            listener(event)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Stage]:
        """Time a stage and send its events; stages may be nested.

        Args:
            name: the stage's name, for example ``calibrate``.
            total: all work, in ``unit``; None if unknown.
            unit: what the work is counted in.

        Yields:
            The stage; call its ``advance`` as work finishes.
        """
        stage = Stage(self.emit, name, total, unit, self._clock)
        stage.emit("started")
        try:
            yield stage
        except BaseException:
            stage.emit("stopped")
            raise
        self.seconds[name] = round(self.seconds.get(name, 0.0) + stage.seconds, 3)
        stage.emit("finished")


def duration(seconds: float) -> str:
    """Write a duration for people: ``3.2 s``, ``4 min 10 s``, ``2 h 5 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
