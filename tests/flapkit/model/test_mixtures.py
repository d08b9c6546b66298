"""Whole experts as units: the router goes with them, and what is left computes what the masked model does."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

import flapkit
from flapkit.api import PruneOptions
from flapkit.checkpoint.export import export
from flapkit.checkpoint.serving import vllm_obstacle
from flapkit.model.budget import Budget, unit_costs
from flapkit.model.closed_experts import close_experts_
from flapkit.model.costs import active_cost, param_cost, weight_cost
from flapkit.model.declaration import Block
from flapkit.model.history import plan_of
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import apply_plan_, mask_
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.model.verify import logits_of, random_plan, verify
from flapkit.pruning.algorithm import find_plan
from flapkit.registry import ADAPTER, EXPORTER, SEARCHER, Registry
from flapkit.system.errors import BudgetError, InputError, ModelError, RecipeError

GROUPED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
FORMS = {
    "mixtral": ("mixtral", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, normalised": ("qwen3_moe", {"norm_topk_prob": True}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2, groups": ("deepseek_v2", {**GROUPED, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3, groups": ("deepseek_v3", GROUPED),
    "gpt_oss": ("gpt_oss", {}),
}
DEFAULT = {"metric": "reap", "of": "mixture"}


def adapter(name: str, unit: str = "expert"):
    return Registry.load().create(ADAPTER, name, {"expert_unit": unit})


def mixtral(**changes):
    return tiny_model(tiny_config("mixtral", **changes))


def tokens(count: int = 32) -> torch.Tensor:
    return torch.randint(2, 96, (count, 12), generator=torch.Generator().manual_seed(1))


def reloaded(model, folder, plan):
    """Save a model, load it by the Auto classes, and compare it bit for bit."""
    flapkit.save(model, folder, plan)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    expected = model.state_dict()
    assert expected.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(logits_of(copy.deepcopy(loaded)), logits_of(copy.deepcopy(model)))
    return loaded


@pytest.mark.parametrize("form", FORMS)
def test_sliced_is_masked_and_saved_is_loaded(form, tmp_path):
    name, changes = FORMS[form]
    config = tiny_config(name, **changes)
    model, sites = tiny_model(config), adapter(name).sites(config)
    mixtures = [site for site in sites if site.kind == "mixture"]
    assert verify(model, mixtures).effect > 0.1
    proof = verify(model, sites, seed=1)
    assert proof.error <= 1e-5
    plan = random_plan(sites)
    apply_plan_(model, sites, plan, {})
    again = {site.name: site.units for site in adapter(name).sites(model.config)}
    assert all(again[site.name] == len(plan.keep[site.name]) for site in mixtures)
    loaded = reloaded(model, tmp_path / "pruned", plan)
    width = mixtures[0].block.width
    for site in mixtures:
        assert getattr(loaded.config.per_layer_config[site.layer], width) == len(plan.keep[site.name])


def test_a_closed_expert_is_never_chosen():
    model = mixtral()
    gate = model.model.layers[0].mlp.gate
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    close_experts_(gate, [1, 3], [])
    for router in (gate, copy.deepcopy(gate)):
        logits, weights, chosen = router(hidden)
        assert set(chosen.flatten().tolist()) == {0, 2}
        assert torch.isneginf(logits[:, [1, 3]]).all()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(64))


def test_masking_a_copy_leaves_the_buffers_that_it_shares():
    config = tiny_config("deepseek_v3")
    model, sites = tiny_model(config), adapter("deepseek_v3").sites(config)
    gate = model.model.layers[1].mlp.gate
    before = gate.e_score_correction_bias.clone()
    buffers = {id(tensor): tensor for tensor in model.buffers()}
    masked = copy.deepcopy(model, buffers)
    mask_(masked, sites, random_plan(sites))
    assert torch.equal(gate.e_score_correction_bias, before)
    assert masked.model.layers[1].mlp.gate.e_score_correction_bias.isneginf().any()


def test_the_budget_is_met_and_the_router_keeps_enough(tmp_path):
    model = mixtral(num_local_experts=8)
    whole = model.num_parameters()
    sites = adapter("mixtral").sites(model.config)
    plan = flapkit.prune_(model, tokens(), ratio=0.4, adapter=adapter("mixtral"), **DEFAULT)
    assert whole - model.num_parameters() == plan.removed_params(sites)
    base = sum(site.params for site in sites if site.kind == "mixture")
    assert 0 <= round(0.4 * base) - plan.removed_params(sites) < sites[1].params_per_unit
    assert all(len(plan.keep[site.name]) == site.units for site in sites if site.kind == "attention")
    reloaded(model, tmp_path / "pruned", plan)
    with pytest.raises(BudgetError, match=r"the largest ratio of mixture is 0\.75"):
        flapkit.prune_(mixtral(num_local_experts=8), tokens(), ratio=0.8, adapter=adapter("mixtral"), **DEFAULT)


def test_experts_and_heads_in_one_ranking():
    model = mixtral(num_local_experts=8)
    plan = flapkit.prune_(model, tokens(), "frequency", ratio=0.5, adapter=adapter("mixtral"))
    kept = {name.split(".")[2]: len(units) for name, units in plan.keep.items()}
    assert kept.keys() == {"attention", "mixture"}


def test_too_few_experts_are_refused():
    sites = adapter("mixtral").sites(tiny_config("mixtral"))
    keep = {site.name: tuple(range(site.units)) for site in sites}
    with pytest.raises(InputError, match=r"layers\.0\.mixture keeps 1 expert; its router chooses among at least 2"):
        PruningPlan({**keep, "layers.0.mixture": (3,)}).check(sites)
    grouped = adapter("deepseek_v3").sites(tiny_config("deepseek_v3", **GROUPED))
    (mixture,) = [site for site in grouped if site.kind == "mixture"]
    assert (mixture.runs, mixture.least) == (2, 4)


def test_channels_after_whole_experts(tmp_path):
    model = mixtral(num_local_experts=6)
    first = flapkit.prune_(model, tokens(), ratio=0.3, adapter=adapter("mixtral"), **DEFAULT)
    second = flapkit.prune_(model, tokens(200), ratio=0.3)
    assert any(name.endswith(".experts.0") for name in second.keep)
    plan = plan_of(model)
    for layer in range(2):
        experts = first.keep[f"layers.{layer}.mixture"]
        assert plan.keep[f"layers.{layer}.mixture"] == experts
        named = {name for name in plan.keep if name.startswith(f"layers.{layer}.experts.")}
        assert named == {f"layers.{layer}.experts.{expert}" for expert in experts}
    reloaded(model, tmp_path / "pruned", plan)


def test_whole_experts_after_channels(tmp_path):
    """The experts have biases by then, which go with them."""
    model = mixtral(num_local_experts=6)
    flapkit.prune_(model, tokens(200), ratio=0.3)
    assert model.model.layers[0].mlp.experts.down_proj_bias.shape[0] == 6
    proof = verify(model, adapter("mixtral").sites(model.config))
    assert proof.error <= 1e-5
    second = flapkit.prune_(model, tokens(), ratio=0.3, adapter=adapter("mixtral"), **DEFAULT)
    plan = plan_of(model)
    experts = second.keep["layers.0.mixture"]
    assert len(experts) < 6
    assert len(model.model.layers[0].mlp.experts.down_proj_bias) == len(experts)
    named = {name for name in plan.keep if name.startswith("layers.0.experts.")}
    assert named == {f"layers.0.experts.{expert}" for expert in experts}
    reloaded(model, tmp_path / "pruned", plan)


@pytest.mark.parametrize("form", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3, groups", "gpt_oss"])
def test_experts_and_channels_of_the_others(form, tmp_path):
    name, changes = FORMS[form]
    config = tiny_config(name, **changes)
    model, sites = tiny_model(config), adapter(name, "both").sites(config)
    assert verify(model, sites).error <= 1e-5
    plan = random_plan(sites, seed=1)
    for site in (site for site in sites if site.within):
        assert bool(plan.keep[site.name]) == (site.expert in plan.keep[site.within])
    before = model.num_parameters()
    apply_plan_(model, sites, plan, {})
    assert before - model.num_parameters() == plan.removed_params(sites)
    reloaded(model, tmp_path / "pruned", plan)
    again = {site.name: site.units for site in adapter(name, "both").sites(model.config)}
    shared = [site.name for site in sites if "shared" in site.name]
    assert len(shared) == {"qwen2_moe": 2, "deepseek_v3": 1}.get(name, 0)
    assert all(again[name] == len(plan.keep[name]) > 0 for name in shared)
    assert "()" not in plan.summary(sites)


@pytest.mark.parametrize(("name", "sequential"), [("mixtral", False), ("qwen3_moe", False), ("mixtral", True)])
def test_one_plan_of_experts_and_channels(name, sequential, tmp_path):
    model = tiny_model(tiny_config(name, num_local_experts=6, num_experts=6))
    whole, sites = model.num_parameters(), adapter(name, "both").sites(model.config)
    options = PruneOptions(sequential=sequential)
    plan = flapkit.prune_(model, tokens(64), "reap", ratio=0.5, adapter=adapter(name, "both"), options=options)
    budget = Budget.over(sites, 0.5)
    assert 0 <= budget.amount - plan.removed_params(sites) < min(unit_costs(sites, budget.cost))
    assert budget.base == sum(site.params for site in sites)
    biases = sum(
        bias.numel() for key, bias in model.named_parameters() if key.endswith(("o_proj.bias", "down_proj_bias"))
    )
    assert whole - model.num_parameters() == plan.removed_params(sites) - biases
    kept = [len(plan.keep[site.name]) for site in sites if site.kind == "mixture"]
    assert min(kept) >= 2
    assert sum(kept) < 12
    assert any(0 < len(plan.keep[site.name]) < site.units for site in sites if site.within)
    reloaded(model, tmp_path / "pruned", plan)
    again = Registry.load().create(SEARCHER, "plan", {"path": tmp_path / "pruned" / "plan.json"})
    assert again.search(sites, {}, budget) == plan


@pytest.mark.parametrize("searcher", ["al_am", "per_parameter"])
@pytest.mark.parametrize("measure", ["params", "active_params", "memory"])
def test_every_budget_of_experts_and_channels(searcher, measure):
    model = mixtral(num_local_experts=6)
    sites = adapter("mixtral", "both").sites(model.config)
    params = param_cost(model, sites, model.num_parameters(), biased=False)
    costs = [params, active_cost(model, sites, params), weight_cost(params, torch.bfloat16)]
    cost = next(cost for cost in costs if cost.measure == measure)
    draw = torch.Generator().manual_seed(1)
    scores = {site.name: torch.rand(site.units, site.channels_per_unit, generator=draw).double() for site in sites}
    for left in (0.8, 0.75):
        budget = Budget.leaving(cost, sites, int(left * cost.total), f"{measure}: x")
        plan = find_plan(sites, scores, Registry.load().create(SEARCHER, searcher), budget)
        assert 0 <= int(left * cost.total) - (cost.total - cost.removed(sites, plan)) < max(unit_costs(sites, cost))
    sliced = copy.deepcopy(model)
    apply_plan_(sliced, sites, plan, {})
    again = adapter("mixtral", "both").sites(sliced.config)
    counted = param_cost(sliced, again, sliced.num_parameters(), biased=False)
    assert costs[0].left(sites, plan) == sliced.num_parameters()
    left_active = active_cost(sliced, again, counted)
    assert costs[1].left(sites, plan) == left_active.shown(left_active.total)
    with pytest.raises(BudgetError, match="the largest ratio of blocks"):
        find_plan(sites, scores, Registry.load().create(SEARCHER, searcher), Budget.over(sites, 0.97))


def test_widths_of_the_experts_that_stay_are_rounded():
    model = mixtral(num_local_experts=6, intermediate_size=24)
    plan = flapkit.prune_(
        model, tokens(64), "reap", budget={"ratio": 0.5, "multiple_of": 4}, adapter=adapter("mixtral", "both")
    )
    widths = {len(units) for name, units in plan.keep.items() if ".experts." in name and units}
    assert all(width % 4 == 0 for width in widths)
    assert any(not units for units in plan.keep.values())


def test_equal_layers_need_no_code(tmp_path):
    model = mixtral()
    plan = flapkit.prune_(model, tokens(), "reap", "ul_um", ratio=0.25, of="mixture", adapter=adapter("mixtral"))
    flapkit.save(model, tmp_path / "pruned", plan)
    agreed = export(tmp_path / "pruned", Registry.load().create(EXPORTER, "hf-stock"), tmp_path / "out")
    assert agreed.relative < 1e-6
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock) is MixtralForCausalLM
    assert stock.config.num_local_experts == 3


def test_different_numbers_of_experts_cannot_be_padded(tmp_path):
    model, sites = mixtral(), adapter("mixtral").sites(tiny_config("mixtral"))
    keep = {site.name: tuple(range(site.units)) for site in sites}
    plan = PruningPlan({**keep, "layers.0.mixture": (0, 2)})
    apply_plan_(model, sites, plan, {})
    flapkit.save(model, tmp_path / "pruned", plan)
    with pytest.raises(ModelError, match="the number of experts, 2, cannot be padded to 4"):
        export(tmp_path / "pruned", Registry.load().create(EXPORTER, "hf-stock", {"pad": True}), tmp_path / "out")


def test_a_token_uses_as_many_experts_as_before():
    model, sites = mixtral(), adapter("mixtral").sites(tiny_config("mixtral"))
    cost = active_cost(model, sites, param_cost(model, sites, model.num_parameters(), biased=True))
    expert = sum(parameter[0].numel() for parameter in model.model.layers[0].mlp.experts.parameters())
    assert cost.left(sites, PruningPlan({site.name: tuple(range(site.units)) for site in sites})) == (
        model.num_parameters() - 2 * 2 * expert
    )
    keep = {site.name: tuple(range(site.units - (site.kind == "mixture"))) for site in sites}
    assert cost.removed(sites, PruningPlan(keep)) == 2 * model.config.hidden_size


def test_vllm_needs_equal_layers():
    config = tiny_config("mixtral")
    assert "the same number of experts in all layers" in vllm_obstacle(config, adapter("mixtral").sites(config))


def test_what_does_not_suit_whole_experts_is_refused():
    with pytest.raises(RecipeError, match=r"metric 'wifv' does not score whole experts, the units of layers\.0\.mix"):
        flapkit.prune_(mixtral(), tokens(), adapter={"name": "auto", "expert_unit": "expert"})
    with pytest.raises(BudgetError, match=r"set adapter: \{name: auto, expert_unit: expert\}"):
        flapkit.prune_(mixtral(), tokens(), **DEFAULT)
    with pytest.raises(ModelError, match="the declaration of 'llama' has no experts; use channel"):
        adapter("llama").sites(tiny_config("llama"))
    both = {"name": "auto", "expert_unit": "both"}
    with pytest.raises(RecipeError, match=r"searcher 'ul_um' does not choose whole experts and channels"):
        flapkit.prune_(mixtral(), tokens(), "reap", "ul_um", adapter=both)
    with pytest.raises(
        BudgetError, match=r"times no whole experts, the units of layers\.0\.mixture; set the adapter's"
    ):
        flapkit.prune_(mixtral(), tokens(), "reap", budget={"latency": 0.7}, adapter=both)
    sites = adapter("mixtral", "both").sites(tiny_config("mixtral"))
    keep = {site.name: tuple(range(site.units)) for site in sites}
    for wrong, says in (("layers.0.mixture", "removes this expert"), ("layers.0.experts.0", "keeps this expert")):
        units = (1, 2, 3) if wrong.endswith("mixture") else ()
        with pytest.raises(InputError, match=rf"layers\.0\.experts\.0 keeps .* units, and layers\.0\.mixture {says}"):
            PruningPlan({**keep, wrong: units}).check(sites)
    with pytest.raises(InputError, match="a mixture, and no other block, names its `router`"):
        Block("mixture", "mlp", "experts.down_proj", {"gate": "e"})
