"""The rows of a sweep on the disk."""

from __future__ import annotations

import logging

import pytest

from flapkit.run.sweep.results import RESULTS, Results, Row
from flapkit.system.errors import OutputError


def test_rows_are_found_again(tmp_path):
    row = Row(
        "a",
        {"metric": "wifv"},
        None,
        {"dense": 8, "pruned": 7, "removed": 1, "blocks": 6},
        {"text": {"dense": 1.0, "pruned": 2.0}},
        {"piqa": {"items": 3}},
        {"mean": {"dense": {"value": 0.5, "stderr": None}, "pruned": {"value": 0.4, "stderr": 0.1}}},
        0.5,
        {"prune": 0.1},
        method="mine",
    )
    Results(tmp_path / "out").add(row)
    found = Results(tmp_path / "out")
    assert found.rows == {"a": row}
    assert found.done("a")
    assert found.of("a", {"metric": "ifv"}, "renamed").method == "renamed"


def test_a_point_that_failed_is_tried_again(tmp_path):
    results = Results(tmp_path)
    results.add(Row("a", {}, "BudgetError: too much"))
    assert not results.done("a")
    results.add(Row("a", {}))
    assert Results(tmp_path).done("a")


def test_a_half_written_line_is_taken_away_and_said(tmp_path, caplog):
    results = Results(tmp_path)
    results.add(Row("a", {}))
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"id": "b", "sett')
    with caplog.at_level(logging.WARNING, logger="flapkit"):
        again = Results(tmp_path)
    assert "removed the last line" in caplog.text
    assert set(again.rows) == {"a"}
    again.add(Row("b", {}))
    assert set(Results(tmp_path).rows) == {"a", "b"}


@pytest.mark.parametrize("line", ["not JSON", '{"id": "a"}', '{"id": "a", "settings": {}, "more": 1}', "[1]"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / RESULTS).write_text(line + "\n")
    with pytest.raises(OutputError, match=r"results\.jsonl:1: damaged"):
        Results(tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("\\begin")
    with pytest.raises(OutputError, match=r"holds files but no results\.jsonl"):
        Results(tmp_path)
    with pytest.raises(OutputError):
        Results(tmp_path / "thesis.tex" / "out")
