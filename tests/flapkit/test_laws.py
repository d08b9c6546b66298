"""The laws that hold at every site of every form of LLaMA."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import FORMS, make_llama

import flapkit
from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import apply_plan_, mask_, slice_
from flapkit.pruning.algorithm import find_corrections, find_plan, score_sites
from flapkit.pruning.collector import measure
from flapkit.pruning.components import needed_statistics
from flapkit.pruning.moments import Moments
from flapkit.registry import COMPENSATOR, METRIC, SEARCHER, Registry


def planned(model, tokens, ratio=0.4, compensator="bias"):
    registry = Registry.load()
    metric, repair = registry.create(METRIC, "wifv"), registry.create(COMPENSATOR, compensator)
    sites = flapkit.sites(model)
    statistics = measure(model, sites, needed_statistics([metric, repair]), [{"input_ids": tokens}])
    scores = score_sites(model, sites, statistics, metric)
    plan = find_plan(sites, scores, registry.create(SEARCHER, "al_am"), Budget.over(sites, ratio))
    return sites, plan, find_corrections(model, sites, statistics, [repair], plan)


@torch.no_grad()
def test_sliced_is_masked(llama, tokens, probe):
    sites, plan, corrections = planned(llama, tokens)
    masked = copy.deepcopy(llama)
    mask_(masked, sites, plan, corrections)
    apply_plan_(llama, sites, plan, corrections)
    torch.testing.assert_close(llama(probe).logits, masked(probe).logits, atol=1e-5, rtol=0)
    prefix = llama(probe[:, :8], use_cache=True)
    rest = llama(probe[:, 8:], past_key_values=prefix.past_key_values)
    torch.testing.assert_close(rest.logits, masked(probe).logits[:, 8:], atol=1e-5, rtol=0)
    greedy = [model.generate(probe, max_new_tokens=8, do_sample=False, pad_token_id=0) for model in (llama, masked)]
    assert torch.equal(*greedy)


@pytest.mark.parametrize("of", ["blocks", "model", "attention", "mlp"])
def test_budget_is_exact(llama, tokens, of):
    before, sites = llama.num_parameters(), flapkit.sites(llama)
    plan = flapkit.prune_(llama, tokens, ratio=0.25, of=of, compensator="none")
    assert before - llama.num_parameters() == plan.removed_params(sites)
    budget = Budget.over(sites, 0.25, of, before)
    pruned = [site for site in sites if of in ("blocks", "model", site.kind)]
    assert 0 <= budget.params - plan.removed_params(sites) < min(site.params_per_unit for site in pruned)


@torch.no_grad()
def test_constant_channels_cost_nothing(llama, tokens):
    """An MLP channel that is the same for every token has variance 0, and its mean takes its place exactly."""
    sites = [site for site in flapkit.sites(llama) if site.kind == "mlp"]
    for layer in llama.model.layers:
        layer.mlp.gate_proj.weight[:5] = 0
        layer.mlp.up_proj.weight[:5] = 0
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            if projection.bias is not None:
                projection.bias[:5] = 1.5
    statistics = measure(llama, sites, [Moments], [{"input_ids": tokens}])
    assert all((statistics[site.name][Moments].variance[:5] == 0).all() for site in sites)
    expected = llama(tokens).logits
    plan = PruningPlan({site.name: tuple(range(5, site.units)) for site in sites})
    repair = Registry.load().create(COMPENSATOR, "bias")
    slice_(llama, sites, plan, find_corrections(llama, sites, statistics, [repair], plan))
    torch.testing.assert_close(llama(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_statistics_know_no_batches(llama, tokens):
    sites = flapkit.sites(llama)
    whole = measure(llama, sites, [Moments], [{"input_ids": tokens}])
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(3))
    parts = measure(llama, sites, [Moments], [{"input_ids": part} for part in tokens[order].split(5)])
    for site in sites:
        one, other = whole[site.name][Moments], parts[site.name][Moments]
        assert one.tokens == other.tokens == tokens.numel()
        torch.testing.assert_close(one.mean, other.mean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(one.variance, other.variance, atol=1e-6, rtol=1e-5)


def test_padding_is_not_measured(llama, tokens):
    sites = flapkit.sites(llama)
    padded = torch.cat([tokens, torch.full((len(tokens), 4), 7)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros(len(tokens), 4, dtype=torch.long)], dim=1)
    plain = measure(llama, sites, [Moments], [{"input_ids": tokens}])
    masked = measure(llama, sites, [Moments], [{"input_ids": padded, "attention_mask": mask}])
    for site in sites:
        torch.testing.assert_close(
            plain[site.name][Moments].variance, masked[site.name][Moments].variance, atol=1e-6, rtol=1e-4
        )


@torch.no_grad()
def test_ratio_zero_is_the_identity(llama, tokens, probe):
    expected = llama(probe).logits
    plan = flapkit.prune_(llama, tokens, ratio=0.0)
    assert torch.equal(llama(probe).logits, expected)
    assert PruningPlan.from_json(plan.to_json()) == plan


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_is_loaded_bit_for_bit(llama, tokens, probe, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    # Not `llama.to(dtype)`, which would round the rotary frequencies as well; loading does not.
    llama.save_pretrained(tmp_path / "dense")
    llama = flapkit.load(tmp_path / "dense", dtype)
    plan = flapkit.prune_(llama, tokens, ratio=0.4)
    flapkit.save(llama, tmp_path / "pruned", plan, max_shard_size="20KB")
    assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 1
    expected = llama(probe).logits
    assert torch.equal(flapkit.load(tmp_path / "pruned")(probe).logits, expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert torch.equal(again.eval()(probe).logits, expected)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(flapkit.load(tmp_path / "again")(probe).logits, expected)


ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
    },
    "llama3": FORMS["llama3 rope"]["rope_parameters"],
    "proportional": {"partial_rotary_factor": 0.5},
}


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_type(tokens, probe, tmp_path, rope):
    """Positions are no matter of heads: the pruned model turns them as the dense one does, saved and loaded."""
    model = make_llama(rope_parameters={"rope_theta": 10000.0, **ROPES[rope], "rope_type": rope})
    sites, plan, corrections = planned(model, tokens)
    masked = copy.deepcopy(model)
    mask_(masked, sites, plan, corrections)
    apply_plan_(model, sites, plan, corrections)
    expected = masked(probe).logits
    torch.testing.assert_close(model(probe).logits, expected, atol=1e-5, rtol=0)
    flapkit.save(model, tmp_path / "pruned", plan)
    assert torch.equal(flapkit.load(tmp_path / "pruned")(probe).logits, model(probe).logits)


def test_a_pruned_model_is_pruned_again(llama, tokens, probe):
    flapkit.prune_(llama, tokens, ratio=0.3)
    before, sites = llama.num_parameters(), flapkit.sites(llama)
    plan = flapkit.prune_(llama, tokens, ratio=0.3)
    assert before - llama.num_parameters() >= plan.removed_params(sites) - 200
    assert torch.isfinite(llama(probe).logits).all()


def test_trains_after_slicing(llama, tokens):
    flapkit.prune_(llama, tokens, ratio=0.4)
    llama.train()
    before = {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = llama(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(not torch.equal(parameter, before[name]) for name, parameter in llama.named_parameters())


def test_pruning_a_copy_that_shares_weights_leaves_the_model_as_it_is(llama, tokens, probe):
    """Also its biases, to which the compensator adds; and the copy is what a whole copy would be."""
    from flapkit.model.surgery import copy_sharing_weights

    sites = flapkit.sites(llama)
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    logits = llama(probe).logits
    whole, shared = copy.deepcopy(llama), copy_sharing_weights(llama, sites)
    storage = {tensor.data_ptr() for tensor in llama.parameters()}
    assert all(parameter.data_ptr() in storage for parameter in shared.parameters() if parameter.dim() > 1)
    assert flapkit.prune_(shared, tokens, ratio=0.4) == flapkit.prune_(whole, tokens, ratio=0.4)
    assert torch.equal(shared(probe).logits, whole(probe).logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())
    assert torch.equal(llama(probe).logits, logits)
