"""What a run keeps, and that a run which goes on ends as one that was never stopped."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from conftest import RECIPE as SMALL
from conftest import make_llama

from flapkit.checkpoint.load import load_tokenizer
from flapkit.evaluation.scores import Score, TaskScores
from flapkit.execution.executor import record_of, repairs_of
from flapkit.execution.resume import ResumeStore
from flapkit.execution.whole import WholeExecutor
from flapkit.model.surgery import Correction
from flapkit.pruning.algorithm import Repairs
from flapkit.pruning.collector import run_batch
from flapkit.pruning.sequential import LayerRepair
from flapkit.pruning.trials import Trials
from flapkit.recipe.load import load_recipe
from flapkit.run.pipeline import run
from flapkit.system.errors import OutputError
from flapkit.system.workdir import open_workdir

RECIPE = {
    **SMALL,
    "model": {"path": "model", "dtype": "float32"},
    "calibration": {"dataset": "text.txt", "samples": 24, "length": 16, "batch_size": 2},
    "budget": {"ratio": 0.3},
    "report": {"error_windows": 0},
    "evaluate": {},
}
EVALUATE = {"evaluate": {"perplexity": [{"dataset": "text.txt", "length": 16, "windows": 2}]}}
PASS = 12
"""Batches of one pass over the calibration text."""

PASSES = ["calibration.statistics_memory=15KB", "compensator=least_squares"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_llama(vocab_size=2048).save_pretrained(folder)
    load_tokenizer("builtin:tiny-llama").save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "text.txt").write_text("".join(f"def f{n}(model):\n    return model * {n}\n" for n in range(200)))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


class Died(BaseException):
    """Stands for what ends a process."""


def count_batches(patched, die_at=None):
    """Count the batches that are run, as they come; die before one of them, counted from 0."""
    ran, run_whole = [], run_batch

    def counted(*args, **kwargs):
        if len(ran) == die_at:
            raise Died
        ran.append(args)
        run_whole(*args, **kwargs)

    patched.setattr("flapkit.execution.lightning.module.run_batch", counted)
    return ran


def counted_run(recipe, die_at=None, **options):
    """Run a recipe; return how many batches of calibration that took."""
    with pytest.MonkeyPatch.context() as patched:
        ran = count_batches(patched, die_at)
        if die_at is None:
            run(recipe, **options)
        else:
            with pytest.raises(Died):
                run(recipe, **options)
    return len(ran)


def same(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in ("plan.json", "model.safetensors"))


def test_a_calibration_goes_on_pass_by_pass(home):
    """What a pass over the text has found is not measured again; a pass that was not finished is."""
    batches = counted_run(load_recipe("recipe.yaml", [*PASSES, "output=whole"]))
    assert batches == 4 * PASS
    for stopped in (1, 2 * PASS + 5):
        recipe = load_recipe("recipe.yaml", [*PASSES, f"output=out{stopped}"])
        assert counted_run(recipe, stopped) == stopped
        assert counted_run(recipe, resume=True) == batches - stopped // PASS * PASS
        assert same(home / f"out{stopped}", home / "whole")
    assert list(home.glob(".*")) == []


def test_a_sequential_repair_goes_on_layer_by_layer(home, monkeypatch):
    changes = ["compensator=least_squares", "calibration.sequential=true"]
    run(load_recipe("recipe.yaml", [*changes, "output=whole"]))
    repaired, repair = [], LayerRepair.repair

    def dying(self, *args):
        repaired.append(self)
        if len(repaired) == 2:
            raise Died
        return repair(self, *args)

    monkeypatch.setattr(LayerRepair, "repair", dying)
    recipe = load_recipe("recipe.yaml", changes)
    assert_dies(recipe)
    run(recipe, resume=True)
    assert len(repaired) == 1 + recipe_layers(home)
    assert same(home / "out", home / "whole")


def test_a_resumed_search_has_its_whole_course(home, monkeypatch):
    """A trial is not run again, and the values of all are in the result."""
    searcher = "searcher={name: evolution, generations: 2, children: 2, survivors: 1, steps: [0.25]}"
    whole = run(load_recipe("recipe.yaml", [searcher, "output=whole"])).pruned.search
    ran, tried = [], Trials.__call__

    def dying(self, *args):
        ran.append(args)
        if len(ran) == 4:
            raise Died
        return tried(self, *args)

    monkeypatch.setattr(Trials, "__call__", dying)
    recipe = load_recipe("recipe.yaml", [searcher])
    assert_dies(recipe)
    assert run(recipe, resume=True).pruned.search == whole
    assert len(ran) < 1 + whole["trials"]
    finite = {trial: value for trial, value in whole["values"].items() if value is not None}
    assert finite[str(whole["best_trial"])] == min(finite.values())
    assert json.loads((home / "out" / "result.json").read_text())["search"] == whole
    assert same(home / "out", home / "whole")


def recipe_layers(home):
    return json.loads((home / "model" / "config.json").read_text())["num_hidden_layers"]


@pytest.mark.parametrize("stopped", [17, 41])
def test_a_damaged_file_is_named_and_made_anew_once_it_is_removed(home, stopped):
    """Stopped in the second pass, it has scores; in the fourth, it has corrections as well."""
    run(load_recipe("recipe.yaml", [*PASSES, "output=whole"]))
    recipe = load_recipe("recipe.yaml", PASSES)
    counted_run(recipe, stopped)
    files = sorted((home / ".out.work").glob("*.safetensors"))
    content = files[0].read_bytes()
    files[0].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(OutputError, match=f"{files[0].name}: this file of an interrupted run is damaged"):
        run(recipe, resume=True)
    files[0].unlink()
    run(recipe, resume=True)
    assert same(home / "out", home / "whole")


def test_stopped_again_and_again(home):
    run(load_recipe("recipe.yaml", [*PASSES, "output=whole"]))
    recipe = load_recipe("recipe.yaml", PASSES)
    # The first run finishes one pass, the second another.
    assert [counted_run(recipe, 17, resume=True) for _ in range(2)] == [17, 17]
    assert counted_run(recipe, resume=True) == 2 * PASS
    assert same(home / "out", home / "whole")


def test_a_stop_behind_calibration(home, monkeypatch):
    """As in the search, or while the output is written: nothing is run again."""
    run(load_recipe("recipe.yaml", [*PASSES, "output=whole"]))
    with monkeypatch.context() as patched:
        patched.setattr("flapkit.run.pipeline.save_run", lambda *args, **kwargs: (_ for _ in ()).throw(Died))
        assert_dies(load_recipe("recipe.yaml", PASSES))
    assert counted_run(load_recipe("recipe.yaml", PASSES), resume=True) == 0
    assert same(home / "out", home / "whole")


def assert_dies(recipe, **options):
    with pytest.raises(Died):
        run(recipe, **options)
    assert list(recipe.path.parent.glob(f".{recipe.recipe.output}.work"))


def test_nothing_is_left_of_a_run_that_has_finished_nothing(home):
    assert counted_run(load_recipe("recipe.yaml"), 5) == 5
    assert list(home.glob(".*")) == []


def test_figures_of_the_dense_model_are_measured_once(home, monkeypatch):
    (home / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **EVALUATE}))
    recipe = load_recipe("recipe.yaml")
    assert counted_run(recipe, 3) == 3
    names, whole = [], WholeExecutor.evaluate
    monkeypatch.setattr(
        WholeExecutor, "evaluate", lambda self, texts, name: names.append(name) or whole(self, texts, name)
    )
    record = run(recipe, resume=True)
    assert names == ["evaluate pruned"]
    assert record.perplexity == run(recipe, overwrite=True).perplexity


def test_figures_round_trip(tmp_path):
    asked = TaskScores("rows.jsonl", 2, "ab", 0, 0, {"acc": Score(0.5, None, (0.0, 1.0))})
    with open_workdir(tmp_path / "out", resume=True) as work:
        kept = ResumeStore(work)
        for _ in range(2):
            assert kept.figures("tasks", dict[str, TaskScores], lambda: {"boolq": asked}) == {"boolq": asked}
        assert kept.figures("tasks", dict[str, TaskScores], dict) == {"boolq": asked}
        assert kept.figures("none", list[str], list) == []
        assert work.records() == ["tasks.json"]
        work.finish()


def test_pieces_round_trip(tmp_path):
    repair = Repairs({"a/b": Correction(torch.ones(2, 3), None, "why"), "c": Correction()}, {"a/b": 0.1, "c": None})
    with open_workdir(tmp_path / "out", resume=True) as work:
        for make in (lambda: record_of(repair), pytest.fail):
            found = repairs_of(ResumeStore(work).find("repair from a/b", make))
            assert found.expected == repair.expected
            assert found.corrections["c"] == Correction()
            assert found.corrections["a/b"].note == "why"
            assert torch.equal(found.corrections["a/b"].weight, torch.ones(2, 3))
        work.finish()


def test_check_tells_what_a_stopped_run_has_left(home, command):
    (home / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **EVALUATE}))
    counted_run(load_recipe("recipe.yaml"), 3)
    code, out, err = command("check", "recipe.yaml")
    assert code == 0, err
    assert "finished perplexity.json; --resume continues from it" in out
    code, _, err = command("run", "recipe.yaml")
    assert (code, "--resume" in err and "perplexity.json" in err) == (2, True)
    code, _, err = command("run", "recipe.yaml", "--resume", "--set", "budget.ratio=0.4")
    assert (code, "used a different recipe: budget.ratio: 0.3 then, 0.4 now" in err) == (2, True)
    assert command("run", "recipe.yaml", "--resume")[0] == 0


def test_a_text_that_changed_meanwhile(home):
    recipe = load_recipe("recipe.yaml", PASSES)
    counted_run(recipe, 15)
    (home / "text.txt").write_text((home / "text.txt").read_text().replace("model", "other"))
    with pytest.raises(OutputError, match=r"used a different recipe: text\.calibration:"):
        run(recipe, resume=True)
    run(recipe, overwrite=True)
