"""What the listeners of the command line write."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from flapkit.cli.progress import Bars, JsonLines, PlainLines
from flapkit.system.errors import BudgetError
from flapkit.system.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def work(listener, clock, steps=4):
    """Do four steps of five seconds each."""
    with Progress(listener, clock=clock).stage("calibrate", total=steps, unit="windows") as stage:
        for _ in range(steps):
            clock.now += 5
            stage.advance()


def test_plain_lines_come_now_and_then():
    clock, written = Clock(), io.StringIO()
    work(PlainLines(written, clock), clock)
    assert written.getvalue().splitlines() == [
        "calibrate: 2 of 4 windows, about 10.0 s left",
        "calibrate: 4 of 4 windows, about 0.0 s left",
        "calibrate: 4 windows in 20.0 s",
    ]


def test_json_is_an_object_a_line():
    clock, written = Clock(), io.StringIO()
    work(JsonLines(written, clock), clock, steps=2)
    events = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["started", "progress", "progress", "finished"]
    assert events[1] == {
        "event": "progress",
        "stage": "calibrate",
        "seconds": 5.0,
        "done": 1,
        "total": 2,
        "unit": "windows",
        "seconds_left": 5.0,
    }


def test_json_leaves_out_what_comes_too_fast_but_not_the_last():
    clock, written = Clock(), io.StringIO()
    with Progress(JsonLines(written, clock), clock=clock).stage("quick", total=100) as stage:
        for _ in range(100):
            clock.now += 0.01
            stage.advance()
    done = [json.loads(line).get("done") for line in written.getvalue().splitlines()]
    assert len(done) < 12
    assert done[-2:] == [100, 100]


def test_json_has_no_nan_and_says_what_failed():
    written = io.StringIO()
    lines = JsonLines(written)
    lines.write("result", perplexity={"text": [float("inf"), 2.5]})
    lines.error(BudgetError("too much"))
    lines.error(KeyboardInterrupt())
    result, error, stopped = map(json.loads, written.getvalue().splitlines())
    assert result == {"event": "result", "perplexity": {"text": [None, 2.5]}}
    assert error == {"event": "error", "kind": "BudgetError", "message": "too much", "exit_code": 2}
    assert stopped["exit_code"] == 130


def test_bars_end_with_a_line_and_leave_the_terminal_in_order():
    clock, written = Clock(), io.StringIO()
    bars = Bars(Console(file=written, force_terminal=True, width=80))
    work(bars, clock)
    assert "calibrate: 4 windows in 20.0 s" in written.getvalue()
    assert written.getvalue().count("\x1b[?25h") == written.getvalue().count("\x1b[?25l") > 0


def test_bars_stop_where_the_work_fails():
    written = io.StringIO()
    with pytest.raises(ValueError), Progress(Bars(Console(file=written, force_terminal=True))).stage("save"):
        raise ValueError
    assert written.getvalue().count("\x1b[?25h") == written.getvalue().count("\x1b[?25l") > 0
