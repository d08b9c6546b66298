"""A run that has one layer in memory at a time does what a run that has them all does."""

from __future__ import annotations

import errno
import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import FORMS, make_llama
from executions import CALIBRATION, TEXT, add_tokenizer, assert_same, prune, save_dense
from safetensors.torch import load_file, save_file

import flapkit
from flapkit.checkpoint import weights
from flapkit.checkpoint.load import load_config, open_weights
from flapkit.execution import executor, needs
from flapkit.execution import layerwise as module
from flapkit.execution.layer_trials import LayerTrials, Supernet
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import Correction
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.pruning.collector import Collector
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
        "calibration": {**CALIBRATION, "statistics_memory": memory},
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
    changes = {"calibration": {**CALIBRATION, "samples": 64}}
    assert_same(
        prune(home, "whole", execution="whole", **changes), prune(home, "layerwise", execution="layerwise", **changes)
    )


@pytest.mark.parametrize(("unit", "sequential"), [("expert", False), ("both", False), ("both", True)])
def test_whole_experts(home, unit, sequential):
    tiny_model(tiny_config("deepseek_v3", vocab_size=4096)).save_pretrained(home / "dense")
    add_tokenizer(home / "dense")
    changes = {
        "adapter": {"name": "deepseek_v3", "expert_unit": unit},
        "metric": "reap",
        "calibration": {**CALIBRATION, "sequential": sequential, "samples": 64},
        "compensator": "least_squares",
    }
    assert_same(
        prune(home, "whole", execution="whole", **changes),
        prune(home, "layerwise", execution="layerwise", **changes),
        tolerance=1e-5,
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
        "calibration": {**CALIBRATION, "statistics_memory": "10KB"},
    }
    whole = prune(home, "whole", execution="whole", **changes)
    written = []

    def stop(write, path, *content):
        if f"{path.parent.name}/{path.name}".startswith(stopped_at) and stop.armed:
            raise KeyboardInterrupt
        written.append(f"{path.parent.name}/{path.name}")
        write(path, *content)

    for name in ("write_record", "write_tensors"):
        monkeypatch.setattr(module, name, partial(stop, getattr(module, name)))
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


@pytest.mark.parametrize("differs", [True, False])
def test_a_head_that_the_configuration_calls_tied(home, differs):
    """What counts is what the checkpoint holds: a head of its own is kept, one that is the embedding is tied."""
    save_dense(home / "dense", tie_word_embeddings=True)
    (index,) = (home / "dense").glob("*.index.json")
    files = json.loads(index.read_text())
    shard = home / "dense" / files["weight_map"]["model.embed_tokens.weight"]
    tensors = load_file(shard)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding * 0.7 + 0.01 if differs else embedding.clone()
    save_file(tensors, shard, metadata={"format": "pt"})
    files["weight_map"]["lm_head.weight"] = shard.name
    index.write_text(json.dumps(files))
    whole = prune(home, "whole")
    assert_same(whole, prune(home, "layerwise", execution="layerwise"))
    assert ("lm_head.weight" in open_weights(home / "whole")) == differs
    assert load_config(home / "whole").tie_word_embeddings != differs


def test_a_pruned_model_is_pruned_again(home):
    save_dense(home / "dense", num_hidden_layers=4)
    prune(home, "once")
    again = {"model": {"path": "once"}, "budget": {"ratio": 0.2}}
    assert_same(prune(home, "whole", **again), prune(home, "layerwise", execution="layerwise", **again))


@pytest.mark.parametrize("hidden", ["memory", "disk"])
def test_sequential(home, hidden):
    """One sweep gives the same corrections in both executors."""
    save_dense(home / "dense", num_hidden_layers=3)
    changes = {
        "compensator": {"name": "least_squares", "ridge": 0.01},
        "calibration": {**CALIBRATION, "sequential": True},
    }
    layerwise = prune(home, "layerwise", execution={"mode": "layerwise", "hidden_states": hidden}, **changes)
    assert_same(prune(home, "whole", **changes), layerwise, tolerance=1e-5)


@pytest.mark.parametrize("file", ["hidden/observe-0/1", "calibration", "weights"])
def test_a_full_disk(home, monkeypatch, file):
    save_dense(home / "dense")

    def fill(tensors, path, metadata):
        if f"/{file}/" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(weights, "save_file", fill)
    with pytest.raises(OutputError, match=f"{file}.*: the disk is full"):
        prune(home, "out", execution={"mode": "layerwise", "hidden_states": "disk"})
    assert not (home / "out").exists()


def test_a_recovery_trains_what_was_written(home):
    save_dense(home / "dense")
    (home / "other.txt").write_text("".join(f"class C{n}:\n    size = {n}\n" for n in range(80)))
    lora = {"name": "lora", "steps": 2, "length": 16, "dataset": "other.txt"}
    record = prune(home, "out", execution="layerwise", compensator=["bias", lora])
    assert set(next(iter(record.perplexity.values()))) >= {"dense", "pruned", "recovered"}


SEARCH = {"name": "evolution", "generations": 3, "children": 4, "survivors": 2, "steps": [0.25, 0.125]}
SEARCHED = {
    "searcher": SEARCH,
    "compensator": {"name": "least_squares", "ridge": 0.01},
    "calibration": {**CALIBRATION, "samples": 24},
}


def assert_same_search(whole, other):
    """Compare the courses of two searches."""
    expected, found = whole.pruned.search, other.pruned.search
    assert found["values"] == pytest.approx(expected["values"], rel=1e-4)
    assert (found["trials"], found["best_trial"]) == (expected["trials"], expected["best_trial"])


@pytest.mark.parametrize("hidden", ["memory", "disk"])
def test_a_search_by_trials(home, hidden):
    """Several plans share a sweep; values, plan and weights are those of trials on the whole model."""
    save_dense(home / "dense", num_hidden_layers=3, attention_bias=hidden == "disk")
    changes = SEARCHED
    if hidden == "disk":
        calibration = {**CALIBRATION, "samples": 24, "sequential": True}
        changes = {**SEARCHED, "searcher": {**SEARCH, "objective": "perplexity"}, "calibration": calibration}
    layerwise = prune(home, "layerwise", execution={"mode": "layerwise", "hidden_states": hidden}, **changes)
    whole = prune(home, "whole", **changes)
    assert_same(whole, layerwise, tolerance=1e-5)
    assert_same_search(whole, layerwise)
    assert not list(home.glob(".*"))


def test_a_stopped_search_goes_on(home, monkeypatch):
    """No sweep is run again, and no consumer is repaired again."""
    save_dense(home / "dense")
    whole = prune(home, "whole", **SEARCHED)
    sweeps, repaired = [], []
    tried, correct = LayerTrials.__call__, executor.find_corrections

    def dying(self, plans, share):
        sweeps.append(len(plans))
        if len(sweeps) == 4:
            raise KeyboardInterrupt
        return tried(self, plans, share)

    def counted(model, sites, statistics, compensators, plan):
        repaired.append((sites[0].name, plan.keep[sites[0].name]))
        return correct(model, sites, statistics, compensators, plan)

    monkeypatch.setattr(LayerTrials, "__call__", dying)
    monkeypatch.setattr(executor, "find_corrections", counted)
    with pytest.raises(KeyboardInterrupt):
        prune(home, "layerwise", execution="layerwise", **SEARCHED)
    layerwise = run(load_recipe(home / "layerwise.yaml"), resume=True)
    assert_same(whole, layerwise, tolerance=1e-5)
    assert_same_search(whole, layerwise)
    assert sum(sweeps) - sweeps[3] == whole.pruned.search["trials"]
    assert len(repaired) == len(set(repaired))


@pytest.mark.parametrize(("limit", "times"), [(10_000, 1), (1, 2)])
def test_repaired_consumers_stay_within_their_part_of_the_disk(tmp_path, limit, times):
    """What was used last stays; the rest is computed again."""
    sites = flapkit.sites(make_llama())
    site, repaired = sites[0], []

    def correct(some, plan):
        repaired.append(plan.keep[site.name])
        return {site.name: Correction(bias=torch.ones(site.out_features))}

    supernet = Supernet(tmp_path, limit, correct)
    plans = [PruningPlan({each.name: (unit,) for each in sites}) for unit in range(2)]
    for plan in (*plans, plans[1], *plans):
        (correction,) = supernet.corrections([site], plan).values()
        assert torch.equal(correction.bias, torch.ones(site.out_features))
    assert repaired.count((0,)) == times
    assert len(list(tmp_path.iterdir())) == (2 if times == 1 else 1)


def test_a_search_that_the_disk_does_not_hold_is_refused_before_anything_is_measured(home, monkeypatch):
    save_dense(home / "dense")
    monkeypatch.setattr(Collector, "__enter__", lambda self: pytest.fail("measured"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000_000))
    monkeypatch.setattr(needs, "SUPERNETS", 10_000)
    with pytest.raises(OutputError, match=r"\.out\.work: the disk has 10\.0 MB free, .* needed"):
        prune(home, "out", execution="layerwise", report={"error_windows": 0}, evaluate={}, **SEARCHED)


REFUSED = {
    "statistics of layer 0 in memory together": {
        **SEARCHED,
        "calibration": {**CALIBRATION, "statistics_memory": "10KB"},
    },
    "gradients": {"metric": "taylor"},
    "samples": {"evaluate": {"samples": {"prompts": ["def"]}}},
    "flapkit export": {"export": "hf"},
    "model.dtype": {"trainer": {"accelerator": "cpu", "precision": "bf16-true"}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_needs_the_whole_model_is_refused(home, said):
    save_dense(home / "dense")
    with pytest.raises(RecipeError, match=rf"out\.yaml: .*{said}"):
        prune(home, "out", execution="layerwise", **REFUSED[said])
    assert not (home / "out").exists()
