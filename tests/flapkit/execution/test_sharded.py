"""A run whose model is sharded does what a run that has it whole does; here its only process has the only part."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
from conftest import FORMS
from executions import RECIPE, TEXT, add_tokenizer, assert_same, prune, save_dense
from torch import distributed

from flapkit.execution.resume import write_record
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.recipe import load_recipe
from flapkit.run.evaluate import evaluate_checkpoint
from flapkit.run.pipeline import run
from flapkit.system.errors import RecipeError

SHARDED = {"trainer": {"accelerator": "cpu", "strategy": "model_parallel"}}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    # Where the processes meet is in the environment from then on; what other tests start would look there as well.
    with patch.dict(os.environ):
        yield tmp_path
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=() if form == "tied" else pytest.mark.slow) for form in FORMS]
)
def test_sharded_is_whole(home, form):
    save_dense(home / "dense", **FORMS[form])
    assert_same(prune(home, "whole"), prune(home, "sharded", **SHARDED))


@pytest.mark.parametrize("memory", [pytest.param("4GB", marks=pytest.mark.slow), "10KB"])
def test_least_squares(home, memory):
    """With 10 KB of statistics the text goes by several times, and then through the layers one by one."""
    save_dense(home / "dense")
    changes = {
        "metric": "trace",
        "compensator": {"name": "least_squares", "ridge": 0.01},
        "calibration": {**RECIPE["calibration"], "statistics_memory": memory},
    }
    assert_same(prune(home, "whole", **changes), prune(home, "sharded", **SHARDED, **changes), tolerance=1e-5)


@pytest.mark.parametrize("metric", ["taylor", pytest.param("kfac", marks=pytest.mark.slow)])
def test_gradients(home, metric):
    """They need the whole model in a backward pass, which layer by layer cannot do."""
    save_dense(home / "dense", num_key_value_heads=2)
    changes = {"metric": metric, "report": {"error_windows": 0}}
    assert_same(prune(home, "whole", **changes), prune(home, "sharded", **SHARDED, **changes), tolerance=1e-5)


@pytest.mark.slow
def test_experts(home):
    model = tiny_model(tiny_config("mixtral", vocab_size=4096))
    model.save_pretrained(home / "dense")
    add_tokenizer(home / "dense")
    changes = {"calibration": {**RECIPE["calibration"], "samples": 64}}
    assert_same(prune(home, "whole", **changes), prune(home, "sharded", **SHARDED, **changes))


@pytest.mark.slow
def test_half_precision(home):
    save_dense(home / "dense")
    changes = {"model": {"path": "dense", "dtype": "bfloat16"}}
    assert_same(prune(home, "whole", **changes), prune(home, "sharded", **SHARDED, **changes))


@pytest.mark.slow
def test_without_any_calibration(home):
    save_dense(home / "dense")
    changes = {"metric": "magnitude", "compensator": "none", "evaluate": {}, "report": {"error_windows": 0}}
    assert_same(prune(home, "whole", **changes), prune(home, "sharded", **SHARDED, **changes))


@pytest.mark.slow
def test_samples(home):
    save_dense(home / "dense")
    changes = {"evaluate": {"samples": {"prompts": ["def", "return"], "tokens": 5}}}
    whole, sharded = prune(home, "whole", **changes), prune(home, "sharded", **SHARDED, **changes)
    assert sharded.samples == whole.samples


@pytest.mark.parametrize(
    "stopped_at", ["calibration/00001", pytest.param("weights/model-00002", marks=pytest.mark.slow)]
)
def test_a_stopped_run_goes_on(home, monkeypatch, stopped_at):
    """Layers that were judged are not judged again, and those that were written are not written again."""
    save_dense(home / "dense")
    whole = prune(home, "whole")
    written = []

    def stop(path, tensors, metadata):
        if f"{path.parent.name}/{path.name}".startswith(stopped_at) and stop.armed:
            raise KeyboardInterrupt
        written.append(path.name)
        write_record(path, tensors, metadata)

    for module in ("layerwise", "sharded"):
        monkeypatch.setattr(f"flapkit.stages.{module}.write_piece", stop)
    stop.armed = True
    with pytest.raises(KeyboardInterrupt):
        prune(home, "sharded", **SHARDED)
    assert not (home / "sharded").exists()
    stop.armed = False
    before = list(written)
    assert before
    assert_same(whole, run(load_recipe(home / "sharded.yaml"), resume=True))
    assert not set(before) & set(written[len(before) :])


def test_what_was_pruned_is_evaluated_in_parts(home):
    save_dense(home / "dense")
    measured = prune(home, "sharded", **SHARDED).perplexity
    found = evaluate_checkpoint("sharded", load_recipe(home / "sharded" / "recipe.yaml"), against="dense").perplexity
    assert found.keys() == measured.keys()
    for name, figures in measured.items():
        assert found[name]["dense"] == pytest.approx(figures["dense"], rel=1e-6)
        assert found[name]["pruned"] == pytest.approx(figures["pruned"], rel=1e-6)


REFUSED = {
    "tries plans": {"searcher": "optuna"},
    "calibration.sequential": {"calibration": {**RECIPE["calibration"], "sequential": True}},
    "flapkit export": {"export": "hf"},
    "set a number": {"evaluate": {"zero_shot": {"tasks": ["boolq"], "data_dir": "rows"}}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_needs_the_whole_model_is_refused(home, said):
    save_dense(home / "dense")
    if "zero_shot" in REFUSED[said].get("evaluate", {}):
        pytest.importorskip("lm_eval")
    (home / "rows").mkdir()
    (home / "rows" / "boolq.jsonl").write_text('{"query": "is it?", "choices": ["no", "yes"], "gold": 1}\n')
    with pytest.raises(RecipeError, match=rf"strategy: model_parallel: .*{said}"):
        prune(home, "out", **SHARDED, **REFUSED[said])
    assert not (home / "out").exists()


def test_layer_by_layer_it_has_no_use(home):
    save_dense(home / "dense")
    with pytest.raises(RecipeError, match=r"execution: layerwise: .*model_parallel"):
        prune(home, "out", execution="layerwise", **SHARDED)
