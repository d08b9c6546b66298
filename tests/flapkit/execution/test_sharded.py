"""Evaluation of a sharded model; here its only process has the only part."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
from executions import TEXT, assert_same, load_changed, prune, save_dense
from torch import distributed

from flapkit.recipe.load import load_recipe
from flapkit.run.evaluate import evaluate_checkpoint
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


def test_a_model_that_will_be_sharded_is_pruned_layer_by_layer(home):
    save_dense(home / "dense")
    assert_same(prune(home, "whole"), prune(home, "sharded", execution="layerwise", **SHARDED))


def test_pruning_whole_models_is_refused(home):
    save_dense(home / "dense")
    with pytest.raises(RecipeError, match="add `execution: layerwise`"):
        prune(home, "out", **SHARDED)
    assert not (home / "out").exists()


def test_what_was_pruned_is_evaluated_in_parts(home):
    save_dense(home / "dense")
    measured = prune(home, "sharded", execution="layerwise", **SHARDED).perplexity
    found = evaluate_checkpoint("sharded", load_recipe(home / "sharded" / "recipe.yaml"), against="dense").perplexity
    assert found.keys() == measured.keys()
    for name, figures in measured.items():
        assert found[name]["dense"] == pytest.approx(figures["dense"], rel=1e-6)
        assert found[name]["pruned"] == pytest.approx(figures["pruned"], rel=1e-6)


def test_a_batch_size_that_each_process_finds_is_refused(home):
    pytest.importorskip("lm_eval")
    save_dense(home / "dense")
    prune(home, "pruned")
    (home / "rows").mkdir()
    (home / "rows" / "boolq.jsonl").write_text('{"query": "is it?", "choices": ["no", "yes"], "gold": 1}\n')
    asked = {"evaluate": {"zero_shot": {"tasks": ["boolq"], "data_dir": "rows"}}}
    recipe = load_changed(home, "no", model={"path": "pruned"}, **SHARDED, **asked)
    with pytest.raises(RecipeError, match=r"strategy: model_parallel: .*set a number"):
        evaluate_checkpoint("pruned", recipe)
