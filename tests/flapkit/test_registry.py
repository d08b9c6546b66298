"""Plugins that are found, and plugins that are refused."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from flapkit_compensators.least_squares import LeastSquares
from flapkit_searchers.gates import GateTraining

from flapkit.model.site import Site
from flapkit.pruning.components import ImportanceMetric
from flapkit.pruning.moments import Moments
from flapkit.pruning.statistics import SiteStatistics
from flapkit.registry import COMPENSATOR, METRIC, SEARCHER, Registry
from flapkit.system.errors import PluginError

SOURCE = """
from dataclasses import dataclass
from flapkit import hookimpl
from flapkit.pruning.components import ImportanceMetric

@dataclass(frozen=True)
class Mine(ImportanceMetric):
    name = "mine"
    strength: int = 1

    def score(self, site, stats, weight):
        return weight

@hookimpl
def flapkit_metrics():
    return [Mine]
"""


def plugin(source: str, name: str = "plugin_under_test") -> tuple[ModuleType, str]:
    module = ModuleType(name)
    import sys

    sys.modules[name] = module
    exec(source, module.__dict__)
    return module, name


def test_a_plugin_is_found():
    registry = Registry([plugin(SOURCE)])
    assert registry.create(METRIC, "mine", {"strength": 3}).strength == 3
    assert registry.origin(METRIC, "mine") == "plugin_under_test"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("@hookimpl", "", "has no hook"),
        ("flapkit_metrics", "flapkit_metric", "did you mean 'flapkit_metrics'"),
        ("[Mine]", "[int]", "int is not a subclass of ImportanceMetric"),
        ("[Mine]", "[Mine()]", "is not a subclass of ImportanceMetric"),
        ("[Mine]", "Mine", "must return an iterable of classes"),
        ("[Mine]", "[Mine, Mine]", "two plugins offer a metric named 'mine'"),
        ('name = "mine"', "pass", "has no name"),
        ("def score", "def scores", "does not define score"),
        ("@dataclass(frozen=True)", "@dataclass", "frozen dataclass"),
    ],
)
def test_a_plugin_is_refused(old, new, message):
    with pytest.raises(PluginError, match=message.replace("[", r"\[")):
        Registry([plugin(SOURCE.replace(old, new))])


def test_a_clash_names_both():
    with pytest.raises(PluginError, match=r"one\.Mine of one and two\.Mine of two"):
        Registry([plugin(SOURCE, "one"), plugin(SOURCE, "two")])


def test_an_unknown_name_and_an_unknown_option():
    registry = Registry([plugin(SOURCE)])
    with pytest.raises(PluginError, match="unknown metric 'mime'; did you mean 'mine'"):
        registry.get(METRIC, "mime")
    with pytest.raises(PluginError, match="unknown option 'strenght'; did you mean 'strength'"):
        registry.create(METRIC, "mine", {"strenght": 1})
    with pytest.raises(PluginError, match="option 'strength'"):
        registry.create(METRIC, "mine", {"strength": "many"})


def test_a_choice_is_a_name_a_mapping_or_a_component():
    registry = Registry([plugin(SOURCE)])
    mine = registry.build(METRIC, "mine")
    assert registry.build(METRIC, mine) is mine
    assert registry.build(METRIC, {"name": "mine", "strength": 3}) == type(mine)(strength=3)
    with pytest.raises(PluginError, match="unknown option 'strenght'; did you mean 'strength'"):
        registry.build(METRIC, {"name": "mine", "strenght": 3})
    for wrong in ({"strength": 3}, 5, [mine]):
        with pytest.raises(PluginError, match=r"expected a name, a mapping with `name`.*known: mine"):
            registry.build(METRIC, wrong)


def test_an_object_is_checked_like_a_recipe():
    registry = Registry.load()
    with pytest.raises(PluginError, match=r"compensator 'least_squares': option 'ridge.*greater than or equal to 0"):
        registry.build(COMPENSATOR, LeastSquares(ridge=-1.0))
    with pytest.raises(PluginError, match="searcher 'gates': option 'steps'"):
        registry.build(SEARCHER, GateTraining(steps=0))


def test_an_option_that_no_recipe_can_hold_is_not_checked():
    @dataclass(frozen=True)
    class Table(ImportanceMetric):
        name = "table"
        values: torch.Tensor

        def score(self, site, stats, weight):
            return self.values

    table = Table(torch.ones(2))
    assert Registry.load().build(METRIC, table) is table


def test_the_example_of_the_metrics_interface_is_a_metric():
    (example,) = re.findall(r"```python\n(.*?)```", inspect.getdoc(ImportanceMetric), flags=re.DOTALL)
    source = f"from flapkit.interfaces import *\nfrom dataclasses import dataclass\n{example}"
    module, _ = plugin(
        f"{source}\n@hookimpl\ndef flapkit_metrics():\n    return [MeanMagnitude]\n", "example_of_metrics"
    )
    metric = Registry([(module, "example")]).create(METRIC, "mean_magnitude")
    place = Site("layers.0.mlp", 0, "mlp", "c", 3, 2, 4, ())
    moments = Moments(6)
    moments.update(torch.tensor([[1.0, -2.0, 3.0, 0.0, 0.0, 1.0], [3.0, -2.0, -3.0, 0.0, 2.0, 1.0]]))
    scores = metric.score(place, SiteStatistics([moments]), torch.zeros(4, 6))
    assert scores.tolist() == [[2, 2], [0, 0], [1, 1]]
