"""How far a run is: stages tell of themselves, and whoever listens shows it.

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
    """Something that happened to a stage.

    Args:
        kind: ``started``, ``progress``, ``finished``, or ``stopped`` where an exception left the stage.
        stage: the stage's name.
        done: how much of the stage's work is done.
        total: how much work there is; None where nobody can tell.
        unit: what the work is counted in, for example ``windows``.
        seconds: wall time since the stage's beginning.
    """

    kind: Literal["started", "progress", "finished", "stopped"]
    stage: str
    done: int = 0
    total: int | None = None
    unit: str = ""
    seconds: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        """How long the rest will take at the speed so far; None where nobody can tell."""
        if not self.total or not self.done:
            return None
        return self.seconds * max(self.total - self.done, 0) / self.done


Listener = Callable[[Event], None]
"""Shows events; called in the thread that works, so it must be quick."""


class Stage:
    """A stage at work; made by ``Progress.stage``."""

    def __init__(self, tell: Listener, name: str, total: int | None, unit: str, clock: Callable[[], float]) -> None:
        self._tell = tell
        self._clock = clock
        self._began = clock()
        self.name = name
        self.total = total
        self.unit = unit
        self.done = 0

    def advance(self, amount: int = 1) -> None:
        """Say that so much more work is done."""
        self.done += amount
        self.tell("progress")

    def tell(self, kind: Literal["started", "progress", "finished", "stopped"]) -> None:
        """Tell the listeners what happened."""
        self._tell(Event(kind, self.name, self.done, self.total, self.unit, self.seconds))

    @property
    def seconds(self) -> float:
        """Wall time since the beginning."""
        return round(self._clock() - self._began, 3)


class Progress:
    """Where the stages of one run report to.

    Args:
        listeners: what shows the events; none for silence.
        clock: returns the time in seconds.

    Attributes:
        seconds: stage -> wall time, of those that finished; stages of one name add up.
    """

    def __init__(self, *listeners: Listener, clock: Callable[[], float] = time.perf_counter) -> None:
        self._listeners = listeners
        self._clock = clock
        self.seconds: dict[str, float] = {}

    def tell(self, event: Event) -> None:
        """Pass an event on to every listener."""
        for listener in self._listeners:
            listener(event)

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Stage]:
        """Time a piece of work and tell of it; stages may be nested.

        Args:
            name: what the work is called, for example ``calibrate``.
            total: how much work there is, in ``unit``; None where nobody can tell.
            unit: what the work is counted in.

        Yields:
            The stage: call its ``advance`` as the work goes on.
        """
        stage = Stage(self.tell, name, total, unit, self._clock)
        stage.tell("started")
        try:
            yield stage
        except BaseException:
            stage.tell("stopped")
            raise
        self.seconds[name] = round(self.seconds.get(name, 0.0) + stage.seconds, 3)
        stage.tell("finished")


def duration(seconds: float) -> str:
    """Write a time as a person says it: ``3.2 s``, ``4 min 10 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
