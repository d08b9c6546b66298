"""``flapkit report``, and ``flapkit run --json``."""

from __future__ import annotations

import json

import pytest
from conftest import write_recipe
from runs import make_run


@pytest.fixture
def runs(tmp_path):
    for name, ratio in (("a", 0.2), ("b", 0.5)):
        run, folder = make_run(name, ratio), tmp_path / name
        folder.mkdir()
        (folder / "report.json").write_text(run.record.to_json())
        (folder / "result.json").write_text(json.dumps(run.result))
        write_recipe(folder)
        (folder / "flapkit.json").write_text(json.dumps(run.made))
    return tmp_path


def test_one_run(command, runs):
    assert command("report", "a") == (0, "a/report.html\n", "")
    assert "wifv + al_am + bias" in (runs / "a" / "report.html").read_text(encoding="utf-8")


def test_several_runs_and_their_figures(command, runs):
    code, out, _ = command("report", "a", "b", "--figures", "pictures", "--form", "svg")
    assert code == 0
    assert out.split() == [
        "comparison.html",
        *(f"pictures/{n}.svg" for n in ("structure", "errors", "zero-shot", "tradeoff")),
    ]
    assert (runs / "comparison.html").is_file()
    assert sorted(path.name for path in (runs / "pictures").iterdir())[0] == "errors.svg"


def test_a_bench_in_the_folder_is_shown(command, runs):
    (runs / "a" / "bench.json").write_text(json.dumps({"ratios": {"decode": 1.234}, "expected": 1.25}))
    assert command("report", "a", "-o", "page.html")[0] == 0
    assert "1.23" in (runs / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "no such folder"),
        (("a", "./a"), "given twice"),
        (("empty",), "cannot be read"),
        (("a", "-o", "text.txt/page.html"), "cannot be written"),
    ],
)
def test_bad_input(command, runs, arguments, message):
    (runs / "empty").mkdir()
    code, out, err = command("report", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_a_damaged_result(command, runs):
    (runs / "a" / "result.json").write_text("{")
    code, _, err = command("report", "a")
    assert code == 2
    assert "result.json: is damaged" in err


def test_json_events_and_nothing_else(command, recipe, tmp_path):
    code, out, _ = command("run", recipe, "--json")
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    begun = [event["stage"] for event in events if event["event"] == "started"]
    assert begun == [event["stage"] for event in events if event["event"] == "finished"]
    assert begun[0] == "text"
    result = events[-1]
    assert (result["event"], result["output"]) == ("result", "out")
    noted = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["params"], result["perplexity"]) == (noted["params"], noted["perplexity"])


def test_json_says_what_is_wrong(command, recipe):
    code, out, err = command("run", recipe.name, "--json", "--set", "metrc=wifv")
    (error,) = map(json.loads, out.splitlines())
    assert (code, error["event"], error["kind"], error["exit_code"]) == (2, "error", "RecipeError", 2)
    assert "did you mean" in error["message"]
    assert "did you mean" in err
