"""Pruning in one call: components by name, as mappings, and as objects."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from flapkit_searchers.al_am import ALAM

import flapkit
from flapkit.system.errors import BudgetError, DataError, FlapkitError, PluginError, RecipeError


def test_a_mapping_is_the_component_with_its_options(tokens):
    searcher = {"name": "al_am", "attention_power": 1}
    plans = [
        flapkit.prune_(make_llama(), tokens, metric=metric, searcher=chosen, compensator=compensator, ratio=0.4)
        for metric, chosen, compensator in (
            ("wifv", ALAM(attention_power=1), ["bias"]),
            ({"name": "wifv"}, searcher, {"name": "bias"}),
            ("wifv", searcher, [{"name": "bias"}]),
        )
    ]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"searcher": "al_an"}, "unknown searcher 'al_an'; did you mean 'al_am'"),
        ({"searcher": {"name": "al_an"}}, "unknown searcher 'al_an'; did you mean 'al_am'"),
        ({"searcher": {"name": "al_am", "min_unit": 2}}, "unknown option 'min_unit'; did you mean 'min_units'"),
        ({"searcher": {"name": "al_am", "multiple_of": 8}}, "unknown option 'multiple_of'"),
        ({"metric": {"nam": "wifv"}}, "expected a name, a mapping with `name`"),
        ({"compensator": ["bias", {"name": "lroa"}]}, "unknown compensator 'lroa'; did you mean 'lora'"),
        ({"adapter": {"name": "llama", "units": "kv_group"}}, "unknown option 'units'; did you mean 'unit'"),
    ],
)
def test_a_wrong_choice_is_said(tokens, chosen, message):
    with pytest.raises(PluginError, match=message):
        flapkit.prune_(make_llama(), tokens, **chosen)


WRONG = {
    "tokens beyond the vocabulary": ({"calibration": torch.full((8, 8), 96)}, DataError, "gives token 96"),
    "a negative token": ({"calibration": torch.full((8, 8), -100)}, DataError, "gives token -100"),
    "rows beyond the vocabulary": (
        {"calibration": [{"input_ids": [1, 2]}, {"input_ids": [3, 400]}]},
        DataError,
        "gives token 400",
    ),
    "a tokenizer's output": ({"calibration": {"input_ids": torch.ones(2, 3)}}, DataError, "give its `input_ids`"),
    "texts": ({"calibration": ["a", "b"]}, DataError, "rows must be mappings"),
    "no text": ({"calibration": None}, DataError, "no calibration text"),
    "a metric of another kind": ({"metric": ALAM()}, PluginError, "expected a name, a mapping"),
    "a number for a searcher": ({"searcher": 5}, PluginError, "expected a name, a mapping"),
    "a number for a compensator": ({"compensator": 5}, PluginError, "expected a name, a mapping"),
    "a number among compensators": ({"compensator": [5]}, PluginError, "expected a name, a mapping"),
    "no compensator": ({"compensator": None}, PluginError, "expected a name, a mapping"),
    "a number for an adapter": ({"adapter": 5}, PluginError, "expected a name, a mapping"),
    "a ratio in words": ({"ratio": "0.2"}, BudgetError, "0.2 is out of range"),
    "options as a mapping": ({"options": {"sequential": True}}, RecipeError, "expected flapkit.PruneOptions"),
    "recovery text beyond the vocabulary": (
        {
            "compensator": ["bias", "lora"],
            "options": flapkit.PruneOptions(recovery_text=torch.full((20, 8), 96)),
        },
        DataError,
        "gives token 96",
    ),
    "too little recovery text": (
        {"compensator": "lora", "options": flapkit.PruneOptions(recovery_text=torch.ones(2, 8, dtype=torch.long))},
        DataError,
        "at least 10 windows",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_refused_before(tokens, forwards, changes, error, message):
    """As a ``FlapkitError``, and the model has not run."""
    model = make_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ran = []
    model.register_forward_hook(lambda *seen: ran.append(seen))
    model.model.register_forward_hook(lambda *seen: ran.append(seen))
    with pytest.raises(error, match=message) as refused:
        flapkit.prune_(model, **{"calibration": tokens, **changes})
    assert isinstance(refused.value, FlapkitError)
    assert not ran
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("options", [{"multiple_of": 0}, {"batch_size": 0}, {"statistics_memory": -1}])
def test_options_are_checked(options):
    with pytest.raises(RecipeError, match="expected a number above 0"):
        flapkit.PruneOptions(**options)


KINDS = ("attention", "mlp")
BUDGETS = {
    "params": {"params": 15_000},
    "memory": {"memory": "60KB"},
    "memory in another type": {"memory": "30KB", "dtype": "bfloat16"},
    "cache": {"kv_cache": 0.5},
    "a ratio": {"ratio": 0.3, "of": "mlp"},
}


@pytest.mark.parametrize("name", BUDGETS)
def test_any_budget_of_a_recipe(name, probe):
    model = make_llama(num_key_value_heads=2)
    sites = flapkit.sites(model)
    plan = flapkit.prune_(model, probe, budget=BUDGETS[name])
    gone = {kind: sum(site.units - len(plan.keep[site.name]) for site in sites if site.kind == kind) for kind in KINDS}
    if name == "cache":
        assert gone == {"attention": 2, "mlp": 0}
    elif name == "a ratio":
        assert gone == {"attention": 0, "mlp": 24}
    else:
        assert 15_000 - max(site.params_per_unit for site in sites) < model.num_parameters() <= 15_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.2}, "leave out `ratio` and `of`"),
        ({"budget": {"memory": 100}}, r"budget\.memory: 100 is not a size of weights"),
        ({"budget": {"memory": "1KB"}}, "the parts that cannot be pruned"),
        ({"budget": {"weights": "1KB"}}, r"budget\.weights: "),
        ({"budget": {"params": 100, "kv_cache": 0.5}}, "got params and kv_cache"),
        ({"budget": {"latency": 0.5}}, "have not been timed on this machine"),
    ],
)
def test_a_budget_that_is_none(changes, message, probe, tmp_path, monkeypatch):
    monkeypatch.setenv("FLAPKIT_CACHE", str(tmp_path))
    model = make_llama()
    with pytest.raises(BudgetError, match=message):
        flapkit.prune_(model, probe, **{"budget": {"kv_cache": 0.5}, **changes})
