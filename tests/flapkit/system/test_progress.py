"""Stages tell of themselves, whatever becomes of them."""

from __future__ import annotations

import pytest

from flapkit.system.progress import Event, Progress, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_stage_tells_of_its_beginning_work_and_end():
    events, clock = [], Clock()
    progress = Progress(events.append, clock=clock)
    with progress.stage("calibrate", 8, "windows") as stage:
        clock.now = 2.0
        stage.advance(2)
        clock.now = 8.0
        stage.advance(6)
    assert events == [
        Event("started", "calibrate", 0, 8, "windows", 0.0),
        Event("progress", "calibrate", 2, 8, "windows", 2.0),
        Event("progress", "calibrate", 8, 8, "windows", 8.0),
        Event("finished", "calibrate", 8, 8, "windows", 8.0),
    ]
    assert [event.seconds_left for event in events] == [None, 6.0, 0.0, 0.0]
    assert progress.seconds == {"calibrate": 8.0}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_stage_that_fails_says_so_and_counts_for_nothing(error):
    events = []
    progress = Progress(events.append)
    with pytest.raises(error), progress.stage("save"):
        raise error
    assert [event.kind for event in events] == ["started", "stopped"]
    assert progress.seconds == {}


def test_stages_of_one_name_add_up():
    clock = Clock()
    progress = Progress(clock=clock)
    for _ in range(2):
        with progress.stage("load"):
            clock.now += 1.5
    assert progress.seconds == {"load": 3.0}


def test_without_an_amount_nobody_knows_what_is_left():
    assert Event("progress", "load", 3, None, "", 1.0).seconds_left is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (3.21, "3.2 s"),
        (59.97, "1 min 0 s"),
        (250, "4 min 10 s"),
        (3599.6, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_a_duration_for_people(seconds, said):
    assert duration(seconds) == said
