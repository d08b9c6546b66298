"""Plugins that are found, and plugins that are refused."""

from __future__ import annotations

from types import ModuleType

import pytest

from flapkit.registry import Registry
from flapkit.system.errors import PluginError

METRIC = """
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
    registry = Registry([plugin(METRIC)])
    assert registry.create("metric", "mine", {"strength": 3}).strength == 3
    assert registry.origin("metric", "mine") == "plugin_under_test"


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
        Registry([plugin(METRIC.replace(old, new))])


def test_a_clash_names_both():
    with pytest.raises(PluginError, match=r"one\.Mine of one and two\.Mine of two"):
        Registry([plugin(METRIC, "one"), plugin(METRIC, "two")])


def test_an_unknown_name_and_an_unknown_option():
    registry = Registry([plugin(METRIC)])
    with pytest.raises(PluginError, match="unknown metric 'mime'; did you mean 'mine'"):
        registry.get("metric", "mime")
    with pytest.raises(PluginError, match="unknown option 'strenght'; did you mean 'strength'"):
        registry.create("metric", "mine", {"strenght": 1})
    with pytest.raises(PluginError, match="option 'strength'"):
        registry.create("metric", "mine", {"strength": "many"})
