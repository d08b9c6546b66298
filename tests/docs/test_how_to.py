"""The plugins and the YAML files of the how-to pages work as they stand."""

from __future__ import annotations

import copy
import re
import runpy
from pathlib import Path

import pytest
from conftest import make_llama

import flapkit
from flapkit.recipe.load import load_recipe
from flapkit.recipe.plugin_files import load_registry
from flapkit.registry import METRIC, SEARCHER
from flapkit.run.sweep.load import load_sweep

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
GREEDY = {"do_sample": False, "pad_token_id": 0}


def block(page: str, language: str, folder: Path, name: str = r"\S+") -> Path:
    """Write the page's block that begins with a file's name into that file; `name` chooses one of several."""
    text = (HOW_TO / page).read_text(encoding="utf-8")
    ((name, code),) = re.findall(rf"```{language}\n# ({name})\n(.*?)```", text, flags=re.DOTALL)
    (folder / name).write_text(code)
    return folder / name


@pytest.fixture
def model():
    return make_llama(num_hidden_layers=3)


def test_a_statistic_of_your_own(tmp_path, model, tokens):
    metric = load_registry([block("statistic.md", "python", tmp_path)]).create(METRIC, "largest_input", {"power": 0.5})
    before = model.num_parameters()
    flapkit.prune_(model, tokens, metric=metric, ratio=0.3)
    assert model.num_parameters() < before


def test_a_budget_for_each_layer(tmp_path, model, tokens):
    path = block("layers.md", "python", tmp_path, "owl.py")
    searcher = load_registry([path]).create(SEARCHER, "owl", {"outlier": 1.5})
    sites = flapkit.sites(model)
    plan = flapkit.prune_(model, tokens, metric="wifn", searcher=searcher, ratio=0.3)
    shares = [
        plan.removed_params(members) / sum(site.params for site in members)
        for members in ([site for site in sites if site.layer == layer] for layer in range(3))
    ]
    assert max(shares) - min(shares) > 0.01


def test_a_budget_for_each_site(tmp_path, model, tokens):
    path = block("layers.md", "python", tmp_path, "modules.py")
    searcher = load_registry([path]).create(SEARCHER, "by_module", {"attention": 0.6})
    sites = flapkit.sites(model)
    plan = flapkit.prune_(model, tokens, searcher=searcher, ratio=0.4)
    weights = {site.name: 0.6 if site.kind == "attention" else 1 for site in sites}
    of_mlp = 0.4 * sum(site.params for site in sites) / sum(site.params * weights[site.name] for site in sites)
    for site in sites:
        share = plan.removed_params([site]) / site.params
        assert of_mlp * weights[site.name] - 1 / site.units < share <= of_mlp * weights[site.name]


def test_a_draft_for_the_dense_model(tmp_path, model, tokens, probe):
    script = runpy.run_path(str(block("draft.md", "python", tmp_path)))
    draft = copy.deepcopy(model)
    assert script["acceptance"](model, draft, probe[:2, :5].split(1), tokens=13) == (1.0, 13 / 3)
    flapkit.prune_(draft, tokens, ratio=0.3)
    rate, per_pass = script["acceptance"](model, draft, [probe[:1, :5]], tokens=12)
    # The same by hand: the draft's guesses after the text so far, up to the first that is not the dense model's token.
    text, made, accepted, passes = model.generate(probe[:1, :5], max_new_tokens=12, **GREEDY), 0, 0, 0
    at = 5
    while at < text.shape[1]:
        guesses = min(5, text.shape[1] - at - 1)
        guessed = draft.generate(text[:, :at], max_new_tokens=guesses, **GREEDY)[0, at:] if guesses else text[0, :0]
        same = int((guessed == text[0, at : at + guesses]).long().cumprod(0).sum())
        made, accepted, passes, at = made + guesses, accepted + same, passes + 1, at + same + 1
    assert (rate, per_pass) == (accepted / made, 12 / passes)


def test_the_comparison_is_a_sweep(tmp_path):
    block("statistic.md", "python", tmp_path)
    assert len(load_sweep(block("compare.md", "yaml", tmp_path), []).points) == 18


def test_the_recipe_of_conversations(tmp_path):
    assert load_recipe(block("conversations.md", "yaml", tmp_path)).recipe.calibration.dataset == "./chat.jsonl"


def test_the_recipe_of_whole_experts(tmp_path):
    loaded = load_recipe(block("remove-experts.md", "yaml", tmp_path))
    assert loaded.recipe.budget.of == "mixture"
    assert loaded.method.metric.scores_experts
