"""A run, and a Lightning script of one's own that does the same."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from conftest import write_recipe

import flapkit
from flapkit.api import PruneOptions
from flapkit.execution.lightning.callbacks import Calibrate
from flapkit.execution.lightning.data import PruningData
from flapkit.execution.lightning.module import CausalLM
from flapkit.execution.lightning.prune import Prune, SaveCheckpoint
from flapkit.execution.lightning.trainer import build_trainer
from flapkit.model.budget import Budget
from flapkit.recipe.load import load_recipe
from flapkit.run.pipeline import run
from flapkit.run.report import RunDocument, draw_figures, render_run
from flapkit.system.progress import Progress, duration


@pytest.fixture
def recipe(recipe):
    return load_recipe(recipe)


def test_a_script_of_callbacks_does_what_a_run_does(recipe, tmp_path):
    record = run(recipe)
    model = flapkit.load("builtin:tiny-llama", "float32")
    sites = flapkit.sites(model)
    calibrate = Calibrate(sites, recipe.method.statistics)
    prune = Prune(calibrate, sites, recipe.method, Budget.over(sites, 0.2))
    trainer = build_trainer([calibrate, prune, SaveCheckpoint(prune, "script")], accelerator="cpu", devices=1)
    trainer.predict(CausalLM(model), PruningData(record.text.calibration), return_predictions=False)
    for name in ("plan.json", "config.json", "model.safetensors"):
        assert (tmp_path / "script" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("compensator", ["bias", "least_squares"])
def test_a_sequential_run_does_what_prune_does(recipe, tmp_path, compensator):
    """Lightning calibrates site by site, with the dense model beside the pruned one; ``prune_`` without Lightning."""
    record = run(load_recipe(tmp_path / "recipe.yaml", ["calibration.sequential=true", f"compensator={compensator}"]))
    model = flapkit.load("builtin:tiny-llama", "float32")
    plan = flapkit.prune_(
        model,
        record.text.calibration,
        compensator=compensator,
        ratio=0.2,
        options=PruneOptions(sequential=True),
    )
    assert plan == record.plan
    written = flapkit.load(tmp_path / "out", "float32").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(written[name], tensor, atol=1e-5, rtol=1e-4)


def test_a_mix_of_texts(home):
    """Whole and layer by layer; the overlap with one of the texts is found, and the record names both."""
    (home / "other.txt").write_text("class Other:\n    size = 1\n" * 100)
    mix = {"mix": [{"dataset": "text.txt", "share": 3}, {"dataset": "other.txt"}], "samples": 8, "length": 32}
    plans = []
    for mode in ("whole", "layerwise"):
        record = run(load_recipe(write_recipe(home, calibration=mix, execution=mode, output=mode)))
        plans.append(record.plan)
        assert any("100.0 % of its scored tokens" in warning for warning in record.warnings)
        written = json.loads((record.output / "flapkit.json").read_text())["calibration"]["mix"]
        assert [(entry["dataset"], entry["share"]) for entry in written] == [("text.txt", 3), ("other.txt", 1)]
        again = load_recipe(record.output / "recipe.yaml").recipe.calibration
        assert again.text.title == "text.txt (0.75) + other.txt (0.25)"
    assert plans[0] == plans[1]


def test_the_record_holds_what_reports_need(recipe, caplog):
    caplog.set_level("WARNING", "flapkit")
    record = run(recipe)
    names = {site.name for site in record.target.sites}
    assert set(record.pruned.scores) == set(record.plan.keep) == names
    assert record.params["removed"] == record.plan.removed_params(record.target.sites)
    (measured,) = record.perplexity.values()
    assert measured["protocol"]["tokens"] == 4 * 31
    assert measured["protocol"]["bytes"] < len((record.output.parent / "text.txt").read_text())
    # The calibration text is the same: of its few lines none is new.
    assert measured["overlap"] == {"ngram": 16, "tokens": 4 * 31, "share": 1.0}
    assert "100.0 % of its scored tokens" in record.warnings[0]
    assert json.loads((record.output / "result.json").read_text())["perplexity"] == record.perplexity
    assert list(record.seconds) == [
        "text",
        "load",
        "evaluate dense",
        "trace dense",
        "calibrate",
        "search",
        "prune",
        "site errors",
        "evaluate pruned",
        "save",
    ]
    assert set(record.errors) == set(record.pruned.expected)
    assert record.error_tokens == 2 * 32


def test_the_time_is_the_commands_with_its_exports(recipe, tmp_path):
    # A second passes with every look at the clock.
    progress = Progress(clock=itertools.count().__next__)
    record = run(load_recipe(tmp_path / "recipe.yaml", ["export=[hf]", "evaluate.perplexity=[]"]), progress=progress)
    result = json.loads((record.output / "result.json").read_text())
    assert {"save", "export"} < set(result["seconds"])
    assert result["total_seconds"] == record.total_seconds == progress.total - 1
    assert record.total_seconds > sum(result["seconds"].values())
    assert duration(record.total_seconds) in (record.output / "report.html").read_text()


def test_the_report_is_drawn_again_as_it_was(recipe, tmp_path):
    # No perplexity: evaluate is set as a whole.
    samples = "evaluate.samples={prompts: [def, import], tokens: 4}"
    run(load_recipe(tmp_path / "recipe.yaml", [samples, "report.figures=[svg]"]))
    written = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    document = RunDocument.of_folder(tmp_path / "out")
    assert render_run(document) == written
    assert [sample.prompt for sample in document.record.samples] == ["def", "import"]
    figures = draw_figures([document], ["svg"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "figures").iterdir()} == figures


def test_errors_are_not_measured_where_nobody_asks(recipe, tmp_path):
    record = run(load_recipe(tmp_path / "recipe.yaml", ["report.error_windows=0"]))
    assert (record.errors, record.error_tokens, "trace dense" in record.seconds) == ({}, 0, False)


def test_what_needs_no_statistics_is_not_calibrated(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(CausalLM, "predict_step", lambda self, batch: pytest.fail("calibrated"))
    changes = ["metric=magnitude", "compensator=none", "evaluate={}"]
    record = run(load_recipe(tmp_path / "recipe.yaml", changes))
    assert "calibrate" not in record.seconds
    assert record.params["removed"] > 0


def test_a_run_that_finds_its_statistics_gives_the_same(recipe, tmp_path, cache, monkeypatch):
    run(recipe, cache=cache)
    monkeypatch.setattr(CausalLM, "predict_step", lambda self, batch: pytest.fail("calibrated"))
    again = run(load_recipe(tmp_path / "recipe.yaml", ["output=again"]), cache=cache)
    assert "calibrate" not in again.seconds
    for name in ("plan.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_zero_shot_tasks_are_asked_of_both_models(recipe, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [{"query": "def", "choices": ["pruned", "x"], "gold": 0}] * 3
    (tmp_path / "openbook_qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = "evaluate.zero_shot={tasks: [openbookqa], data_dir: ., limit: 2}"
    record = run(load_recipe(tmp_path / "recipe.yaml", [asked]))
    found = json.loads((record.output / "result.json").read_text())["zero_shot"]["openbookqa"]
    assert (found["items"], found["few_shot"], found["source"]) == (2, 0, "openbook_qa.jsonl")
    assert set(found["metrics"]) == {"acc", "acc_norm"}
    assert set(found["metrics"]["acc"]) == {"dense", "pruned", "paired"}
    assert {"zero-shot dense", "zero-shot pruned"} <= set(record.seconds)
