"""`unit: auto`: what the family, the budget and the exports allow."""

from __future__ import annotations

import re

import pytest
from conftest import make_llama, write_recipe

import flapkit
from flapkit.model.tiny import tiny_config
from flapkit.pruning.unit_choice import choose_unit
from flapkit.recipe.load import load_recipe
from flapkit.registry import Registry
from flapkit.run.target import find_target


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A model with four query heads for each of two key/value heads."""
    folder = tmp_path_factory.mktemp("grouped") / "model"
    make_llama(num_attention_heads=8, num_key_value_heads=2).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "query_head: the family, the budget and the exports allow it"),
        ({"budget": {"kv_cache": 0.5}}, "kv_group: budget.kv_cache"),
        ({"budget": {"latency": 0.5}}, "kv_group: budget.latency"),
        ({"budget": {"ratio": 0.2, "tensor_parallel": 2}}, "query_head"),
        ({"budget": {"ratio": 0.2, "tensor_parallel": 3}}, "kv_group: budget.tensor_parallel: 3 devices"),
        ({"export": ["torch-export"]}, "query_head"),
        ({"export": [{"name": "hf-stock", "pad": True, "form": "seed_oss"}]}, "kv_group: export hf-stock: .*padded"),
    ],
)
def test_what_the_recipe_allows(grouped, tmp_path, changes, expected):
    recipe = load_recipe(
        write_recipe(tmp_path, adapter={"name": "auto", "unit": "auto"}, model={"path": grouped}, **changes)
    )
    target = find_target(recipe)
    unit, _, _ = target.why_unit.partition(":")
    assert re.match(expected, target.why_unit), target.why_unit
    assert target.adapter == Registry.load().resolve({"name": "llama", "unit": unit}, target.config)
    assert target.sites == target.adapter.sites(target.config)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (tiny_config("falcon", new_decoder_architecture=True), "kv_group: models of type 'falcon' cannot lose single"),
        (tiny_config("llama", num_key_value_heads=4), "kv_group: each unit is a single query head in any case"),
        (tiny_config("llama", num_key_value_heads=1), "kv_group: each unit is a single query head in any case"),
    ],
)
def test_what_the_family_allows(config, expected):
    adapter = Registry.load().resolve({"name": "auto", "unit": "auto"}, config)
    chosen = choose_unit(adapter, config, lambda sites: "")
    assert chosen.reason.startswith(expected)
    assert chosen.adapter.unit == "kv_group"
    assert chosen.sites == adapter.sites(config)


def test_a_unit_that_is_named_stays():
    config = tiny_config("llama")
    adapter = Registry.load().resolve({"name": "llama", "unit": "kv_group"}, config)
    chosen = choose_unit(adapter, config, lambda sites: "")
    assert (chosen.adapter, chosen.reason) == (adapter, "")


def test_the_api_chooses_too(probe):
    model, same = (make_llama(num_attention_heads=8, num_key_value_heads=2) for _ in range(2))
    plan = flapkit.prune_(model, probe, ratio=0.3, adapter={"name": "auto", "unit": "auto"})
    assert plan == flapkit.prune_(same, probe, ratio=0.3, adapter={"name": "llama", "unit": "query_head"})
