"""The plan that a model carries: that of all its prunings, as indices into the dense model."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_llama
from transformers import AutoModelForCausalLM

import flapkit
from flapkit.checkpoint.folder import PLAN
from flapkit.model.classes import dense_config
from flapkit.model.history import plan_of
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import apply_plan_
from flapkit.system.errors import InputError

TWICE = {
    "KV groups": ("kv_group", "kv_group"),
    "query heads": ("query_head", "query_head"),
    "KV groups, then query heads": ("kv_group", "query_head"),
    "query heads, then KV groups": ("query_head", "kv_group"),
}


def grouped():
    """Build a LLaMA of four KV heads, each with three query heads."""
    return make_llama(hidden_size=48, num_attention_heads=12, num_key_value_heads=4)


def prune_twice_(model, tokens, units=("kv_group", "kv_group"), ratio=0.3):
    return [
        flapkit.prune_(model, tokens, ratio=ratio, compensator="none", adapter={"name": "llama", "unit": unit})
        for unit in units
    ]


@pytest.mark.parametrize("units", TWICE.values(), ids=TWICE)
def test_the_units_kept_are_those_of_the_dense_model(tokens, units, tmp_path):
    """Every tensor of the model that was pruned twice is the dense one's, at the indices that its plan says."""
    dense = grouped()
    model = copy.deepcopy(dense)
    prune_twice_(model, tokens, units)
    assert [site.heads for site in flapkit.sites(model)] != [site.heads for site in flapkit.sites(dense)]
    flapkit.save(model, tmp_path / "pruned")
    for name, tensor in model.named_parameters():
        expanded = flapkit.expand_tensor(tensor.detach(), name, tmp_path / "pruned")
        expected = dense.get_parameter(name)
        assert expanded.shape == expected.shape
        kept = expanded != 0
        assert int(kept.sum()) == tensor.numel()
        assert torch.equal(expanded[kept], expected[kept])


@torch.no_grad()
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_two_prunings_are_one(tokens, probe, unit):
    dense = grouped()
    model = copy.deepcopy(dense)
    first, second = prune_twice_(model, tokens, (unit, unit))
    plan = plan_of(model)
    assert plan is not None
    assert plan not in (first, second)
    sites = flapkit.sites(dense, {"name": "llama", "unit": unit})
    plan.check(sites)
    apply_plan_(dense, sites, plan, {})
    assert torch.equal(dense(probe).logits, model(probe).logits)
    assert dense_config(dense.config).to_dict() == dense_config(model.config).to_dict()


def test_save_needs_no_plan_and_refuses_another(llama, tokens, tmp_path):
    first = flapkit.prune_(llama, tokens, ratio=0.2)
    flapkit.save(llama, tmp_path / "first", first)
    second = flapkit.prune_(llama, tokens, ratio=0.2)
    for other in (first, second, PruningPlan({"layers.0.mlp": (0,)})):
        with pytest.raises(InputError, match="this plan is not the model's"):
            flapkit.save(llama, tmp_path / "second", other)
    assert not (tmp_path / "second").exists()
    flapkit.save(llama, tmp_path / "second")
    assert PruningPlan.read(tmp_path / "second" / PLAN) == plan_of(llama)
    assert plan_of(flapkit.load(tmp_path / "second")) == plan_of(llama)


@pytest.mark.parametrize("load", [flapkit.load, AutoModelForCausalLM.from_pretrained])
def test_a_checkpoint_is_pruned_on(llama, tokens, tmp_path, load):
    """Whoever loads it: the plan is that of both prunings."""
    flapkit.save(pruned_once(llama, tokens), tmp_path / "first")
    again = load(tmp_path / "first").eval()
    flapkit.prune_(again, tokens, ratio=0.2)
    flapkit.save(again, tmp_path / "second")
    flapkit.prune_(llama, tokens, ratio=0.2)
    assert PruningPlan.read(tmp_path / "second" / PLAN) == plan_of(llama)


def test_a_model_that_lost_its_plan_gets_no_wrong_one(llama, tokens, tmp_path, caplog):
    pruned_once(llama, tokens).save_pretrained(tmp_path / "first")
    again = flapkit.load(tmp_path / "first")
    flapkit.prune_(again, tokens, ratio=0.2)
    flapkit.save(again, tmp_path / "second")
    assert "the new folder has no plan.json either" in caplog.text
    assert not (tmp_path / "second" / PLAN).exists()
    assert "plan.json" not in (tmp_path / "second" / "README.md").read_text()
    assert flapkit.load(tmp_path / "second").num_parameters() == again.num_parameters()


def pruned_once(model, tokens):
    flapkit.prune_(model, tokens, ratio=0.2)
    return model
