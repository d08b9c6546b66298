"""LoRA: what it puts into a model, and what is left of it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from conftest import make_llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

import flapkit
from flapkit.model.site import Coupling, Site
from flapkit.registry import COMPENSATOR, Registry
from flapkit.system.errors import ModelError, RecipeError


def attach(model, sites, **options):
    return Registry.load().create(COMPENSATOR, "lora", options).recovery().attach(model, sites)


def disturb_(model):
    """Give every update a value that is not zero, as a training would."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


@pytest.fixture
def pruned(llama, tokens):
    flapkit.prune_(llama, tokens, ratio=0.4)
    return llama


@torch.no_grad()
def test_merged_is_unmerged(pruned, probe):
    before, names = pruned(probe).logits, [name for name, _ in pruned.named_parameters()]
    trainable = attach(pruned, flapkit.sites(pruned))
    assert torch.equal(pruned(probe).logits, before)
    disturb_(pruned)
    unmerged = pruned(probe).logits
    assert not torch.allclose(unmerged, before, atol=1e-3)
    trainable.merge_()
    torch.testing.assert_close(pruned(probe).logits, unmerged, atol=1e-5, rtol=0)
    assert [name for name, _ in pruned.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in pruned.parameters())


@torch.no_grad()
def test_removed_leaves_nothing(pruned, probe):
    before = pruned(probe).logits
    trainable = attach(pruned, flapkit.sites(pruned))
    disturb_(pruned)
    trainable.remove_()
    assert torch.equal(pruned(probe).logits, before)
    assert all(parameter.requires_grad for parameter in pruned.parameters())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_the_adapter_is_pefts_own(tmp_path, tokens, probe):
    model = make_llama()
    plan = flapkit.prune_(model, tokens, ratio=0.4)
    flapkit.save(model, tmp_path / "pruned", plan)
    trainable = attach(model, flapkit.sites(model), rank=4)
    disturb_(model)
    expected = model(probe).logits
    for name, content in trainable.files().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    loaded = peft.PeftModel.from_pretrained(flapkit.load(tmp_path / "pruned"), tmp_path / "adapter")
    torch.testing.assert_close(loaded(probe).logits, expected, atol=1e-5, rtol=0)


def test_auto_targets_are_what_pruning_cuts():
    model = make_llama()
    attach(model, flapkit.sites(model))
    trained = {name.split(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert trained == {f"model.layers.{layer}.{part}" for layer in range(2) for part in parts}


def test_named_targets():
    model = make_llama()
    attach(model, flapkit.sites(model), targets=["v_proj", "model.layers.1.mlp.up_proj"])
    trained = {name.split(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.layers.{layer}.self_attn.v_proj" for layer in range(2)} | {"model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize("target", ["v_prj", "model.norm", "lm_head"])
def test_an_unknown_target(target):
    model = make_llama(tie_word_embeddings=True)
    with pytest.raises(RecipeError, match=f"there is no linear '{target}'.*known: down_proj"):
        attach(model, flapkit.sites(model), targets=[target])


def test_nothing_to_train():
    norm = Site("norm", 0, "mlp", "model.norm", 8, 4, 32, (Coupling("model.norm.weight", 0, 4),))
    with pytest.raises(ModelError, match="no pruned site of this LlamaForCausalLM is a linear"):
        attach(make_llama(), [norm])


def stacked(name, consumer, per_unit, **options):
    return Site(
        name, 0, "mlp", consumer, 40, 1, 32, (Coupling(per_unit, 1, 1), Coupling(per_unit, 1, 1, offset=40)), **options
    )


def test_stacked_experts(probe):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, initializer_range=0.2,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    path = "model.layers.0.mlp.experts"
    sites = [stacked(f"expert {i}", f"{path}.down_proj", f"{path}.gate_up_proj", expert=i, dim=2) for i in range(4)]
    with pytest.raises(RecipeError, match="dropout: not supported for stacked experts"):
        attach(model, sites, dropout=0.1)
    with torch.no_grad():
        trainable = attach(model, sites)
        disturb_(model)
        unmerged = model(probe).logits
        trainable.merge_()
        torch.testing.assert_close(model(probe).logits, unmerged, atol=1e-5, rtol=0)


@torch.no_grad()
def test_linears_of_gpt2s_kind(probe):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=1, n_head=4)).eval()
    trainable = attach(model, [], targets=["c_attn", "c_fc", "c_proj"])
    disturb_(model)
    unmerged = model(probe).logits
    trainable.merge_()
    torch.testing.assert_close(model(probe).logits, unmerged, atol=1e-5, rtol=0)
