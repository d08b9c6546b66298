"""Whole blocks go: an attention or an MLP without units leaves its bias, and nothing in the KV cache."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import TEXT, make_llama, write_recipe
from transformers import DynamicCache, StaticCache

import flapkit
from flapkit.api import PruneOptions
from flapkit.checkpoint.export import export, prospect_of
from flapkit.checkpoint.load import load
from flapkit.checkpoint.save import save
from flapkit.checkpoint.serving import vllm_obstacle
from flapkit.evaluation.speed import Workload
from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import Correction, apply_plan_, mask_
from flapkit.model.tiny import doubled, tiny_config, tiny_model
from flapkit.model.verify import logits_of, plan_without_blocks
from flapkit.pruning.algorithm import find_corrections, find_plan
from flapkit.pruning.collector import measure
from flapkit.pruning.ranking import remove_lowest
from flapkit.recipe.load import load_recipe
from flapkit.registry import ADAPTER, COMPENSATOR, EXPORTER, SEARCHER, Registry
from flapkit.run.engines import ENGINES
from flapkit.run.pipeline import run
from flapkit.run.target import find_target
from flapkit.system.errors import BudgetError, InputError, ModelError, PluginError
from flapkit.testing import check_adapter

OPTIONS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def without(model, *names, bias=True):
    """Return the model without some blocks, and the same masked; what is left of a block is a bias."""
    sites = flapkit.sites(model)
    plan = PruningPlan({site.name: () if site.name in names else tuple(range(site.units)) for site in sites})
    draw = torch.Generator().manual_seed(0)
    added = {name: Correction(bias=torch.randn(model.config.hidden_size, generator=draw)) for name in names if bias}
    masked, sliced = copy.deepcopy(model), copy.deepcopy(model)
    mask_(masked, sites, plan, added)
    apply_plan_(sliced, sites, plan, added)
    return sliced, masked


@pytest.fixture
def deep():
    return make_llama(num_hidden_layers=4, num_key_value_heads=2)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma2", "opt", "qwen3", "deepseek_v2", "lfm2", "falcon"])
def test_families(name):
    check_adapter(Registry.load().create(ADAPTER, name), forms=["default"], checks=["whole blocks"])


@torch.no_grad()
@pytest.mark.parametrize(
    "names",
    [
        ("layers.0.attention", "layers.0.mlp", "layers.3.attention", "layers.3.mlp"),
        ("layers.3.attention", "layers.3.mlp"),
        ("layers.0.attention",),
    ],
)
def test_every_cache_gives_the_masked_models_text(deep, probe, names):
    sliced, masked = without(deep, *names)
    torch.testing.assert_close(logits_of(sliced), logits_of(masked), atol=1e-5, rtol=0)
    expected = masked.generate(probe, **OPTIONS)
    for options in (
        {},
        {"use_cache": False},
        {"past_key_values": DynamicCache()},
        {"past_key_values": StaticCache(config=sliced.config, max_cache_len=40)},
    ):
        assert torch.equal(sliced.generate(probe, **options, **OPTIONS), expected)
    assert torch.equal(sliced.generate(probe[:1], assistant_model=copy.deepcopy(sliced), **OPTIONS), expected[:1])


@torch.no_grad()
def test_sliding_windows_are_cropped_after_a_rejected_draft():
    model = tiny_model(doubled(tiny_config("gemma2")))
    sliced, masked = without(model, "layers.0.attention", "layers.3.attention")
    tokens = torch.randint(2, 90, (1, 6), generator=torch.Generator().manual_seed(0))
    draft = without(model, "layers.2.attention", "layers.1.mlp")[0]
    expected = masked.generate(tokens, **OPTIONS)
    assert torch.equal(sliced.generate(tokens, assistant_model=draft, **OPTIONS), expected)


@torch.no_grad()
def test_the_cache_holds_nothing_for_layers_without_attention(deep, probe):
    sliced, _ = without(deep, "layers.0.attention", "layers.2.attention")
    cache = sliced(probe, use_cache=True).past_key_values
    assert cache.get_seq_length() == probe.shape[1]
    assert sum(layer.keys is not None for layer in cache.layers) == 2


@torch.no_grad()
def test_saved_loaded_and_pruned_again(deep, tokens, probe, tmp_path):
    sliced, _ = without(deep, "layers.0.attention", "layers.2.mlp")
    save(sliced, tmp_path / "once")
    loaded = load(tmp_path / "once")
    assert torch.equal(logits_of(loaded), logits_of(sliced))
    assert {site.name for site in flapkit.sites(loaded)} == {
        "layers.0.mlp", "layers.1.attention", "layers.1.mlp", "layers.2.attention", "layers.3.attention", "layers.3.mlp"
    }  # fmt: skip
    flapkit.prune_(loaded, tokens, ratio=0.4, searcher={"name": "al_am", "min_units": 0})
    save(loaded, tmp_path / "twice")
    again = load(tmp_path / "twice")
    assert torch.equal(again.generate(probe, **OPTIONS), again.generate(probe, use_cache=False, **OPTIONS))
    keep = json.loads((tmp_path / "twice" / "plan.json").read_text())["keep"]
    assert len(keep) == 8
    assert keep["layers.0.attention"] == keep["layers.2.mlp"] == []


def test_loads_without_flapkit(deep, tmp_path):
    sliced, _ = without(deep, "layers.0.attention", "layers.0.mlp")
    save(sliced, tmp_path / "pruned")
    torch.save(logits_of(sliced), tmp_path / "logits.pt")
    code = f"""
import sys; sys.modules["flapkit"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "pruned")!r}, trust_remote_code=True).eval()
tokens = torch.randint(2, 96, (1, 8), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    whole = model(tokens, use_cache=False).logits
    prefix = model(tokens[:, :5], use_cache=True).past_key_values
    torch.testing.assert_close(model(tokens[:, 5:], past_key_values=prefix).logits, whole[:, 5:], atol=1e-5, rtol=0)
torch.save(whole, {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    tokens = torch.randint(2, 96, (1, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "out.pt"), sliced(tokens, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("compensator", ["bias", "least_squares", "procrustes"])
def test_the_mean_of_the_output_stays(deep, tokens, compensator):
    repair = Registry.load().create(COMPENSATOR, compensator)
    sites = [site for site in flapkit.sites(deep) if site.layer == 1]
    held_out = torch.arange(len(tokens)) % 4 == 3
    batches = [{"input_ids": tokens, "held_out": held_out}]
    outputs = {site.name: [] for site in sites}
    for site in sites:
        linear = deep.get_submodule(site.consumer)
        linear.register_forward_hook(lambda _, inputs, output, name=site.name: outputs[name].append(output))
    measured = measure(deep, sites, repair.measures(), batches)
    plan = PruningPlan({site.name: () for site in sites})
    corrections = find_corrections(deep, sites, measured, [repair], plan)
    for site in sites:
        mean = outputs[site.name][0].flatten(0, 1).mean(dim=0)
        torch.testing.assert_close(corrections[site.name].bias.float(), mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("compensator", ["none", "bias", "least_squares"])
def test_the_budget_is_met_with_whole_blocks(deep, tokens, compensator, sequential):
    before, sites = deep.num_parameters(), flapkit.sites(deep)
    biases = sum(site.out_features for site in sites)
    plan = flapkit.prune_(
        deep,
        tokens,
        ratio=0.85,
        compensator=compensator,
        searcher={"name": "al_am", "min_units": 0},
        options=PruneOptions(sequential=sequential),
    )
    assert any(not units for units in plan.keep.values())
    budget = Budget.over(sites, 0.85)
    assert 0 <= budget.params - plan.removed_params(sites) < min(site.params_per_unit for site in sites)
    assert 0 <= deep.num_parameters() - before + plan.removed_params(sites) <= biases
    assert torch.isfinite(logits_of(deep)).all()


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_what_all_heads_share_goes_with_the_last(unit, kv_heads):
    model = tiny_model(doubled(tiny_config("qwen3", num_key_value_heads=kv_heads)))
    adapter = Registry.load().create(ADAPTER, "qwen3", {"unit": unit})
    sites = adapter.sites(model.config)
    plan, before = plan_without_blocks(sites), model.num_parameters()
    apply_plan_(model, sites, plan, {})
    assert before - model.num_parameters() == plan.removed_params(sites)
    (gone,) = (site for site in sites if site.kind == "attention" and not plan.keep[site.name])
    assert gone.rest > 0


@pytest.mark.parametrize("ratio", [0.9, 0.94])
def test_one_of_each_kind_stays(deep, ratio):
    sites = flapkit.sites(deep)
    ranking = {site.name: torch.rand(site.units, generator=torch.Generator().manual_seed(1)) for site in sites}
    plan = remove_lowest(sites, ranking, Budget.over(sites, ratio), min_units=0)
    plan.check_left(sites)


def test_bad_plans(deep, tmp_path):
    sites = flapkit.sites(deep)
    whole = {site.name: tuple(range(site.units)) for site in sites}
    none = {site.name: () for site in sites if site.kind == "attention"}
    with pytest.raises(InputError, match="removes every attention, and the model needs one"):
        apply_plan_(deep, sites, PruningPlan({**whole, **none}), {})
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"keep": {name: [] for name in none}}))
    removed = PruningPlan({**whole, **none}).removed_params(sites)
    searcher = Registry.load().create(SEARCHER, "plan", {"path": path})
    budget = Budget.over(sites, removed / sum(site.params for site in sites))
    with pytest.raises((PluginError, InputError), match="removes every attention"):
        find_plan(sites, {}, searcher, budget)
    with pytest.raises(BudgetError, match="at most"):
        remove_lowest(sites, {site.name: torch.zeros(site.units) for site in sites}, Budget.over(sites, 0.99), 0)
    mixture = tiny_model(tiny_config("mixtral"))
    experts = {site.name: () for site in flapkit.sites(mixture) if site.expert is not None}
    rest = {site.name: tuple(range(site.units)) for site in flapkit.sites(mixture)}
    with pytest.raises(InputError, match="keeps no unit"):
        PruningPlan({**rest, **experts}).check(flapkit.sites(mixture))


def test_trains(deep, tokens):
    sliced, _ = without(deep, "layers.0.attention", "layers.0.mlp")
    sliced.train()
    optimizer, losses = torch.optim.AdamW(sliced.parameters(), lr=1e-2), []
    bias = sliced.model.layers[0].self_attn.o_proj.bias
    before = bias.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        loss = sliced(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not torch.equal(bias, before)


GONE = {
    "attention": ("layers.0.attention",),
    "mlp": ("layers.1.mlp",),
    "layer": ("layers.0.attention", "layers.0.mlp"),
}
# What a format needs beside flapkit itself.
EXTRAS = {"compressed-tensors": "compressed_tensors", "onnx": "onnxscript"}
TAKEN = [
    pytest.param(name, gone, marks=[pytest.mark.slow] if name == "onnx" or (name != "hf" and gone != "layer") else [])
    for name in ("hf", "torch-export", "compressed-tensors", "onnx")
    for gone in GONE
]


@pytest.mark.parametrize(("name", "gone"), TAKEN)
def test_formats_with_such_layers(probe, tmp_path, name, gone):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    sliced, _ = without(make_llama(num_key_value_heads=2), *GONE[gone])
    save(sliced, tmp_path / "pruned")
    agreed = export(tmp_path / "pruned", Registry.load().create(EXPORTER, name), tmp_path / "out")
    # Weights of 8 bits.
    assert agreed.relative < (0.1 if name == "compressed-tensors" else 1e-5)


@pytest.mark.parametrize("gone", GONE)
def test_formats_without_such_layers_say_so(tmp_path, gone):
    sliced, _ = without(make_llama(num_key_value_heads=2), *GONE[gone])
    sites = flapkit.sites(sliced)
    for name in ("gguf", "hf-stock"):
        with pytest.raises(
            ModelError, match=rf"^export {name}: {re.escape(GONE[gone][0])} is gone altogether, .*hf, or"
        ):
            Registry.load().create(EXPORTER, name).check(prospect_of(sliced.config, sites))
    what = f"layer {GONE[gone][0][7]} has no {'MLP' if gone == 'mlp' else 'attention'}"
    assert vllm_obstacle(sliced.config, sites) == what
    save(sliced, tmp_path / "pruned")
    with pytest.raises(InputError, match=f"engine vllm does not serve .*: {what}"):
        ENGINES["vllm"].check(str(tmp_path / "pruned"), Workload(), "auto")


@pytest.mark.parametrize(
    "searcher", ["depth", {"name": "al_am", "min_units": 0}, {"name": "plan", "path": "plan.json"}]
)
def test_they_say_so_before_a_run(home, searcher):
    (home / "plan.json").write_text('{"keep": {"layers.1.mlp": []}}')
    for name in ("gguf", "hf-stock"):
        path = write_recipe(home, metric="angular", searcher=searcher, export=[{"name": name, "verify": False}])
        says = f"export {name}: the searcher may remove an attention or an MLP altogether"
        with pytest.raises(ModelError, match=says):
            find_target(load_recipe(path))
    (home / "plan.json").write_text('{"keep": {"layers.1.mlp": [0]}}')
    whole = "al_am" if searcher == "depth" else {**searcher, "min_units": 1} if "min_units" in searcher else searcher
    find_target(load_recipe(write_recipe(home, searcher=whole, export=[{"name": "gguf", "verify": False}])))
    target = find_target(load_recipe(write_recipe(home)))
    assert vllm_obstacle(target.config, target.sites, may_remove=False) == ""
    assert "may remove an attention" in vllm_obstacle(target.config, target.sites, may_remove=True)


def test_a_run_reports_whole_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    path = write_recipe(tmp_path, metric="angular", searcher="depth", budget={"ratio": 0.4})
    record = run(load_recipe(path))
    assert any(not units for units in record.plan.keep.values())
    steps = record.next_steps("out", "dense")
    assert "serve" not in steps
    assert "export" not in steps
