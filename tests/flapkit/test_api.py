"""Pruning in one call: components by name, as mappings, and as objects."""

from __future__ import annotations

import pytest
from conftest import make_llama
from flapkit_searchers.al_am import ALAM

import flapkit
from flapkit.system.errors import PluginError


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
