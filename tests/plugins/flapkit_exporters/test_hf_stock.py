from __future__ import annotations

import json

import pytest
import torch
from conftest import FORMS, make_llama
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
    SeedOssForCausalLM,
)

import flapkit
from flapkit.checkpoint.export import export, prospect_of
from flapkit.checkpoint.formats import Prospect
from flapkit.model.adapter import adapter_class
from flapkit.model.declaration import Block, Family
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import Correction, apply_plan_
from flapkit.registry import EXPORTER, Registry
from flapkit.system.errors import ModelError


def stock(**options):
    return Registry.load().create(EXPORTER, "hf-stock", options)


def uniform(model, folder, heads, bias=True):
    """Save a model that has lost so many heads and seven channels in every layer."""
    sites = flapkit.sites(model)
    lost = {"attention": heads, "mlp": 7}
    plan = PruningPlan({site.name: tuple(range(lost[site.kind], site.units)) for site in sites})
    corrections = {site.name: Correction(bias=torch.ones(site.out_features)) for site in sites} if bias else {}
    apply_plan_(model, sites, plan, corrections)
    flapkit.save(model, folder, plan)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_uniform_layers_need_no_code(tmp_path, form):
    folder = uniform(make_llama(**FORMS[form]), tmp_path / "pruned", heads=1)
    found = export(folder, stock(), tmp_path / "out")
    assert found.relative < 1e-6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config
    assert "per_layer_config" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    # Three of four heads do not divide the hidden size, which LLaMA's classes ask for.
    classes = {"mha": SeedOssForCausalLM, "gqa": LlamaForCausalLM, "biases": LlamaForCausalLM}
    if form in classes:
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is classes[form]


def test_zeros_make_layers_alike(pruned_folder, tmp_path, probe):
    with pytest.raises(ModelError, match="pad: true"):
        export(pruned_folder, stock(), tmp_path / "out")
    found = export(pruned_folder, stock(pad=True), tmp_path / "out")
    assert found.relative < 1e-5
    sizes = flapkit.load(tmp_path / "out").config
    kept = flapkit.load(pruned_folder).config.per_layer_config
    assert sizes.intermediate_size == max(layer.intermediate_size for layer in kept)


def test_a_type_and_a_form(tmp_path):
    folder = uniform(make_llama(), tmp_path / "pruned", heads=2)
    export(folder, stock(form="seed_oss", dtype="bfloat16"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is SeedOssForCausalLM
    assert model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="do not support these numbers of heads"):
        export(uniform(make_llama(), tmp_path / "odd", heads=1), stock(form="llama"), tmp_path / "out2")


def declared(model_type):
    """Make an adapter of one of a few families."""
    opt = model_type == "opt"
    attention = Block(
        "attention", "self_attn", "out_proj" if opt else "o_proj", {"q_proj": "q", "k_proj": "k", "v_proj": "k"}
    )
    mlp = Block("mlp", "mlp", "down_proj", {"gate_proj": "i", "up_proj": "i"})
    fc = Block("mlp", "", "fc2", {"fc1": "i"}, width="ffn_dim")
    layers = "model.decoder.layers" if opt else "model.layers"
    return adapter_class(Family("declared", (model_type,), layers, (attention, fc if opt else mlp)))()


@pytest.mark.parametrize(
    ("config", "biases", "message"),
    [
        (MistralConfig(sliding_window=None, num_hidden_layers=1), {"attention", "mlp"}, ""),
        (MistralConfig(sliding_window=64, num_hidden_layers=1), {"attention", "mlp"}, "lack the biases"),
        (MistralConfig(sliding_window=64, num_hidden_layers=1), set(), ""),
        (Qwen3Config(num_hidden_layers=1), {"attention"}, ""),
        (Qwen3Config(num_hidden_layers=1), {"attention", "mlp"}, "intercept: false"),
        (OPTConfig(num_hidden_layers=1), {"attention", "mlp"}, "do not support these numbers of heads"),
    ],
)
def test_is_refused_before_the_run_where_stock_classes_cannot(config, biases, message):
    found = prospect_of(config, declared(config.model_type).sites(config))
    prospect = Prospect(found.family, config, found.sites, True, frozenset(biases) | found.biases)
    if message:
        with pytest.raises(ModelError, match=message):
            stock().check(prospect)
    else:
        stock().check(prospect)
