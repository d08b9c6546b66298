"""A LoRA of the pruned model does on the dense model, to the kept channels, what it did there."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_llama

import flapkit
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import mask_
from flapkit.system.errors import ModelError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_of(model):
    """Make random LoRA factors of rank 2 for every linear of the layers, by PEFT's names."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, module in model.named_modules():
        if name.endswith(TARGETS):
            rows, columns = module.weight.shape
            found[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator) / 10
            found[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) / 10
    return found


@torch.no_grad()
def add_(model, lora):
    for name, factor in lora.items():
        if ".lora_A." in name:
            module = model.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A")[0])
            module.weight += lora[name.replace("lora_A", "lora_B")] @ factor


@torch.no_grad()
@pytest.mark.parametrize(
    ("form", "unit"),
    [({}, "kv_group"), ({"num_key_value_heads": 2}, "kv_group"), ({"num_key_value_heads": 2}, "query_head")],
)
def test_is_the_same_on_the_masked_dense_model(tokens, probe, tmp_path, form, unit):
    dense = make_llama(**form)
    adapter = {"name": "llama", "unit": unit}
    sites, pruned = flapkit.sites(dense, adapter), copy.deepcopy(dense)
    plan = flapkit.prune_(pruned, tokens, ratio=0.4, compensator="none", adapter=adapter)
    flapkit.save(pruned, tmp_path / "pruned", plan)
    lora = lora_of(pruned)
    expanded = flapkit.expand_lora(lora, tmp_path / "pruned")
    add_(pruned, lora)
    add_(dense, expanded)
    mask_(dense, sites, plan)
    torch.testing.assert_close(dense(probe).logits, pruned(probe).logits, atol=1e-5, rtol=1e-5)
    assert all(torch.count_nonzero(expanded[name]) == torch.count_nonzero(lora[name]) for name in lora)


@torch.no_grad()
def test_a_parameter(tokens, tmp_path):
    dense = make_llama()
    pruned = copy.deepcopy(dense)
    plan = flapkit.prune_(pruned, tokens, ratio=0.4, compensator="none")
    flapkit.save(pruned, tmp_path / "pruned", plan)
    name = "model.layers.0.mlp.down_proj.weight"
    found = flapkit.expand_tensor(pruned.get_parameter(name), name, tmp_path / "pruned")
    keep = list(plan.keep["layers.0.mlp"])
    assert torch.equal(found[:, keep], dense.get_parameter(name)[:, keep])
    assert torch.count_nonzero(found) == len(keep) * dense.config.hidden_size


def test_what_does_not_belong_to_the_checkpoint(pruned_folder):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    with pytest.raises(ModelError, match="belongs to this checkpoint"):
        flapkit.expand_lora({name: torch.zeros(39, 2)}, pruned_folder)
    (pruned_folder / "plan.json").unlink()
    with pytest.raises(ModelError, match=r"plan\.json, the list of the kept units, is missing"):
        flapkit.expand_lora({name: torch.zeros(39, 2)}, pruned_folder)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_loads_what_was_mapped_back(tokens, probe, tmp_path):
    peft = pytest.importorskip("peft")
    dense = make_llama()
    pruned = copy.deepcopy(dense)
    plan = flapkit.prune_(pruned, tokens, ratio=0.4)
    flapkit.save(pruned, tmp_path / "pruned", plan)
    options = peft.LoraConfig(r=2, target_modules=list(TARGETS), init_lora_weights=False, task_type="CAUSAL_LM")
    lora = peft.get_peft_model_state_dict(peft.get_peft_model(pruned, options))
    expanded = flapkit.expand_lora(lora, tmp_path / "pruned")
    found = peft.set_peft_model_state_dict(peft.get_peft_model(dense, options), expanded)
    assert not found.unexpected_keys
    assert isinstance(plan, PruningPlan)
