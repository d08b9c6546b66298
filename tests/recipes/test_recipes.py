from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from flapkit.model.budget import Budget
from flapkit.recipe.files import find_recipe, shipped_recipes
from flapkit.recipe.load import load_recipe
from flapkit.registry import ADAPTER
from flapkit.run.presets import PRESETS


def llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int = 0, vocab: int = 32000
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        vocab_size=vocab,
    )


MODELS = {
    "builtin:tiny-llama": llama(192, 512, 6, 6, vocab=2048),
    "huggyllama/llama-7b": llama(4096, 11008, 32, 32),
    "huggyllama/llama-13b": llama(5120, 13824, 40, 40),
    "huggyllama/llama-30b": llama(6656, 17920, 60, 52),
    "huggyllama/llama-65b": llama(8192, 22016, 80, 64),
    "meta-llama/Llama-2-7b-hf": llama(4096, 11008, 32, 32),
    "meta-llama/Meta-Llama-3-8B": llama(4096, 14336, 32, 32, 8, vocab=128256),
    "lmsys/vicuna-7b-v1.5": llama(4096, 11008, 32, 32),
    "HuggingFaceTB/SmolLM2-135M-Instruct": llama(576, 1536, 30, 9, 3, vocab=49152),
    "models/smollm2-135m": llama(576, 1536, 30, 9, 3, vocab=49152),
}
PAPER = {
    ("llama-7b", 20): 14.62,
    ("llama-7b", 30): 17.62,
    ("llama-7b", 50): 31.80,
    ("llama-13b", 20): 13.66,
    ("llama-13b", 30): 15.65,
    ("llama-13b", 50): 24.20,
    ("llama-30b", 20): 10.86,
    ("llama-30b", 30): 12.49,
    ("llama-30b", 50): 19.36,
    ("llama-65b", 20): 9.79,
    ("llama-65b", 30): 10.90,
    ("llama-65b", 50): 15.30,
}
RECIPES = shipped_recipes()
each_recipe = pytest.mark.parametrize("name", RECIPES)


def test_they_are_all_there() -> None:
    paper = {f"{model}-flap{percent}" for model, percent in PAPER}
    others = {"demo", "llama-2-7b-flap20", "llama-3-8b-flap20", "vicuna-7b-flap20", "smollm2-flap20", "smollm2-best20"}
    assert set(RECIPES) >= others | paper


@each_recipe
def test_it_loads_and_says_what_it_does(name: str) -> None:
    loaded = load_recipe(find_recipe(name))
    first = RECIPES[name].read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) < 120
    assert loaded.recipe.output == f"runs/{name}"
    assert loaded.recipe.model.path in MODELS
    assert loaded.recipe.evaluate.perplexity


@each_recipe
def test_its_name_is_its_ratio(name: str) -> None:
    if percent := re.search(r"[a-z](\d+)$", name):
        assert load_recipe(RECIPES[name]).recipe.budget.ratio == int(percent[1]) / 100


@each_recipe
def test_its_sites_and_budget_from_the_configuration_alone(name: str) -> None:
    loaded = load_recipe(RECIPES[name])
    config = MODELS[loaded.recipe.model.path]
    adapter: Any = loaded.adapter or loaded.registry.get(ADAPTER, "llama")()
    sites = adapter.sites(config)
    assert len(sites) == 2 * config.num_hidden_layers
    query = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    block = config.hidden_size * (2 * query + 2 * shared + 3 * config.intermediate_size)
    budget = Budget.over(sites, loaded.recipe.budget.ratio, loaded.recipe.budget.of)
    assert budget.base == config.num_hidden_layers * block
    assert budget.params == pytest.approx(loaded.recipe.budget.ratio * budget.base, abs=0.5)


def test_llama_7b_by_hand() -> None:
    """32 layers of 4 · 4096² in the attention and 3 · 4096 · 11008 in the MLP; a fifth of them goes."""
    loaded = load_recipe(find_recipe("llama-7b-flap20"))
    sites = loaded.registry.get(ADAPTER, "llama")().sites(MODELS["huggyllama/llama-7b"])
    attention, mlp = sites[0], sites[1]
    assert (attention.units, attention.params_per_unit, attention.params) == (32, 2_097_152, 67_108_864)
    assert (mlp.units, mlp.params_per_unit, mlp.params) == (11_008, 12_288, 135_266_304)
    budget = Budget.over(sites, loaded.recipe.budget.ratio, loaded.recipe.budget.of)
    assert (budget.base, budget.params) == (6_476_005_376, 1_295_201_075)


@pytest.mark.parametrize(("model", "percent"), PAPER)
def test_the_papers_numbers_stand_in_the_comments(model: str, percent: int) -> None:
    first = RECIPES[f"{model}-flap{percent}"].read_text(encoding="utf-8").splitlines()[0]
    assert f"{percent} %" in first
    assert f": {PAPER[model, percent]:.2f} (dense" in first


def test_the_papers_protocol() -> None:
    for model, percent in PAPER:
        recipe = load_recipe(RECIPES[f"{model}-flap{percent}"]).recipe
        assert (recipe.calibration.dataset, recipe.calibration.samples, recipe.calibration.length) == (
            "wikitext2",
            1024,
            128,
        )
        (perplexity,) = recipe.evaluate.perplexity
        assert (perplexity.dataset, perplexity.split, perplexity.length, perplexity.stride) == (
            "wikitext2",
            "test",
            128,
            None,
        )
        assert (recipe.metric.name, recipe.searcher.name, recipe.compensator[0].name) == ("wifv", "al_am", "bias")


def test_the_papers_baselines() -> None:
    """Uniform, without a repair; the text of Wanda-sp is what the released code takes."""
    for metric in ("wanda-sp", "magnitude"):
        recipe = load_recipe(RECIPES[f"llama-7b-{metric}20"]).recipe
        assert recipe.metric.name == metric.replace("-", "_")
        assert (recipe.searcher.name, [spec.name for spec in recipe.compensator]) == ("ul_um", ["none"])
    wanda = load_recipe(RECIPES["llama-7b-wanda-sp20"]).recipe.calibration
    assert (wanda.dataset, wanda.samples, wanda.length) == ("c4", 128, 128)


def test_vicuna_is_calibrated_on_conversations() -> None:
    loaded = load_recipe(RECIPES["vicuna-7b-flap20"])
    assert loaded.adapter is not None
    assert loaded.adapter.name == "vicuna"
    assert loaded.recipe.calibration.field == "messages"


def test_the_demo_needs_no_network_and_no_accelerator() -> None:
    recipe = load_recipe(RECIPES["demo"]).recipe
    assert recipe.model.path.startswith("builtin:")
    assert {recipe.calibration.dataset, *(entry.dataset for entry in recipe.evaluate.perplexity)} == {"stdlib"}
    assert recipe.calibration.split == "train"
    assert {entry.split for entry in recipe.evaluate.perplexity} == {"heldout"}
    assert recipe.trainer.accelerator == "cpu"


def test_presets_differ_in_their_method_alone_and_flap_is_the_papers() -> None:
    presets = {name: load_recipe(RECIPES[name]).recipe for name in PRESETS}
    own = {"output", "metric", "searcher", "compensator", "calibration", "evaluate", "adapter"}
    assert len({preset.model_dump_json(exclude=own) for preset in presets.values()}) == 1
    paper = load_recipe(RECIPES["llama-2-7b-flap20"]).recipe
    assert presets["flap"].model_dump(exclude={"model", "output"}) == paper.model_dump(exclude={"model", "output"})


def test_every_file_of_the_folder_is_a_recipe() -> None:
    folder = RECIPES["demo"].parent
    assert {path.name for path in Path(folder).iterdir() if path.is_file()} == {f"{name}.yaml" for name in RECIPES}
