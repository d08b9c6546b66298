"""A run that has one layer in memory at a time does what a run that has them all does."""

from __future__ import annotations

import errno

import pytest
import torch
from conftest import FORMS
from executions import RECIPE, TEXT, add_tokenizer, assert_same, prune, save_dense

from flapkit.checkpoint.load import open_weights
from flapkit.checkpoint.weights import write_tensors
from flapkit.execution.resume import write_record
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.recipe.load import load_recipe
from flapkit.run.pipeline import run
from flapkit.system.errors import OutputError, RecipeError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.mark.parametrize("form", FORMS)
def test_layerwise_is_whole(home, form):
    save_dense(home / "dense", **FORMS[form])
    assert_same(prune(home, "whole", execution="whole"), prune(home, "layerwise", execution="layerwise"))


@pytest.mark.parametrize("memory", ["4GB", "10KB"])
@pytest.mark.parametrize("hidden", ["memory", "disk"])
def test_least_squares(home, memory, hidden):
    """With 10 KB of statistics, a layer is measured in parts, and goes by twice."""
    save_dense(home / "dense")
    changes = {
        "metric": "trace",
        "compensator": {"name": "least_squares", "ridge": 0.01},
        "calibration": {**RECIPE["calibration"], "statistics_memory": memory},
    }
    whole = prune(home, "whole", execution="whole", **changes)
    layerwise = prune(home, "layerwise", execution={"mode": "layerwise", "hidden_states": hidden}, **changes)
    assert_same(whole, layerwise, tolerance=1e-5)
    assert {path.name for path in home.iterdir() if path.name.startswith(".")} == set()


def test_experts(home):
    """Their weights stand one by one in a checkpoint, and stacked in the model."""
    model = tiny_model(tiny_config("mixtral", vocab_size=4096))
    model.save_pretrained(home / "dense")
    add_tokenizer(home / "dense")
    changes = {"calibration": {**RECIPE["calibration"], "samples": 64}}
    assert_same(
        prune(home, "whole", execution="whole", **changes), prune(home, "layerwise", execution="layerwise", **changes)
    )


def test_half_precision(home):
    save_dense(home / "dense")
    changes = {"model": {"path": "dense", "dtype": "bfloat16"}}
    whole, layerwise = (prune(home, mode, execution=mode, **changes) for mode in ("whole", "layerwise"))
    assert_same(whole, layerwise)
    assert next(iter(open_weights(home / "layerwise").values())).dtype == torch.bfloat16


def test_without_any_calibration(home):
    save_dense(home / "dense")
    changes = {"metric": "magnitude", "compensator": "none"}
    assert_same(
        prune(home, "whole", execution="whole", **changes), prune(home, "layerwise", execution="layerwise", **changes)
    )


@pytest.mark.parametrize("hidden", ["memory", "disk"])
@pytest.mark.parametrize("stopped_at", ["calibration/00001", "weights/model-00002", "weights/model-00003"])
def test_a_stopped_run_goes_on(home, monkeypatch, stopped_at, hidden):
    """Layers that were measured are not measured again, and those that were written are not written again."""
    save_dense(home / "dense", attention_bias=True)
    changes = {
        "compensator": {"name": "least_squares", "ridge": 0.01},
        "calibration": {**RECIPE["calibration"], "statistics_memory": "10KB"},
    }
    whole = prune(home, "whole", execution="whole", **changes)
    written = []

    def stop(path, tensors, metadata):
        if f"{path.parent.name}/{path.name}".startswith(stopped_at) and stop.armed:
            raise KeyboardInterrupt
        written.append(f"{path.parent.name}/{path.name}")
        write_record(path, tensors, metadata)

    monkeypatch.setattr("flapkit.execution.layerwise.write_record", stop)
    stop.armed = True
    execution = {"mode": "layerwise", "hidden_states": hidden}
    with pytest.raises(KeyboardInterrupt):
        prune(home, "layerwise", execution=execution, **changes)
    assert not (home / "layerwise").exists()
    stop.armed = False
    before = list(written)
    assert before
    layerwise = run(load_recipe(home / "layerwise.yaml"), resume=True)
    assert not set(before) & set(written[len(before) :])
    assert_same(whole, layerwise, tolerance=1e-5)
    assert not list(home.glob(".*"))


@pytest.mark.parametrize("hidden", ["memory", "disk"])
def test_sequential(home, hidden):
    """One sweep gives the same corrections in both executors."""
    save_dense(home / "dense", num_hidden_layers=3)
    changes = {
        "compensator": {"name": "least_squares", "ridge": 0.01},
        "calibration": {**RECIPE["calibration"], "sequential": True},
    }
    layerwise = prune(home, "layerwise", execution={"mode": "layerwise", "hidden_states": hidden}, **changes)
    assert_same(prune(home, "whole", **changes), layerwise, tolerance=1e-5)


@pytest.mark.parametrize("file", ["hidden/observe-0/1", "calibration", "weights"])
def test_a_full_disk(home, monkeypatch, file):
    save_dense(home / "dense")

    def fill(path, tensors, metadata):
        if f"/{file}/" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_tensors(path, tensors, metadata)

    monkeypatch.setattr("flapkit.execution.resume.write_tensors", fill)
    with pytest.raises(OutputError, match=f"{file}.*: the disk is full"):
        prune(home, "out", execution={"mode": "layerwise", "hidden_states": "disk"})
    assert not (home / "out").exists()


def test_a_recovery_trains_what_was_written(home):
    save_dense(home / "dense")
    (home / "other.txt").write_text("".join(f"class C{n}:\n    size = {n}\n" for n in range(80)))
    lora = {"name": "lora", "steps": 2, "length": 16, "dataset": "other.txt"}
    record = prune(home, "out", execution="layerwise", compensator=["bias", lora])
    assert set(next(iter(record.perplexity.values()))) >= {"dense", "pruned", "recovered"}


REFUSED = {
    "gradients": {"metric": "taylor"},
    "samples": {"evaluate": {"samples": {"prompts": ["def"]}}},
    "flapkit export": {"export": "hf"},
    "model.dtype": {"trainer": {"accelerator": "cpu", "precision": "bf16-true"}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_needs_the_whole_model_is_refused(home, said):
    save_dense(home / "dense")
    with pytest.raises(RecipeError, match=rf"execution: layerwise: .*{said}"):
        prune(home, "out", execution="layerwise", **REFUSED[said])
    assert not (home / "out").exists()
