"""Every default family passes every check: here one in every form and a sample of the others; all with ``-m slow``."""

from __future__ import annotations

from pathlib import Path

import pytest

from flapkit.model.derive import Auto, as_yaml, derive
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.model.verify import verify
from flapkit.recipe.plugin_files import load_family
from flapkit.registry import ADAPTER, Registry
from flapkit.system.errors import ModelError
from flapkit.testing import CHECKS, FORMS, _forms, check_adapter, conformance

PAGE = Path(__file__).parents[3] / "docs" / "families.md"
NAMES = [name for name in Registry.load().names(ADAPTER) if name not in ("auto", "vicuna")]


@pytest.mark.parametrize("name", NAMES)
def test_sliced_is_masked(name):
    adapter = Registry.load().create(ADAPTER, name)
    for model_type in type(adapter).family.model_types:
        configs = [config for _, config in _forms(tiny_config(model_type), tuple(FORMS))]
        if name == "deepseek_v2":
            configs.append(tiny_config(model_type, q_lora_rank=None))
        for config in configs:
            proof = verify(tiny_model(config), adapter.sites(config))
            assert proof.error <= 1e-5
            assert proof.effect > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_every_other_check(name):
    checks = [check for check in CHECKS if check != "sliced is masked"]
    check_adapter(Registry.load().create(ADAPTER, name), checks=checks)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "olmo2", "gpt_oss"])
def test_a_sample(name):
    checks = ["counts", "constant channels", "ratio 0", "save and load", "generate", "trains"]
    check_adapter(Registry.load().create(ADAPTER, name), forms=["default"], checks=checks)


def test_falcon_has_three_layouts():
    forms = {each.form for each in conformance(Registry.load().create(ADAPTER, "falcon"), checks=["counts"])}
    assert {"default", "grouped heads", "ALiBi"} <= forms


def test_the_page_names_every_family():
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in NAMES if f"| `{name}` |" not in page] == []
    assert "no:" not in page


UNDECLARED = (
    "apertus", "arcee", "biogpt", "cohere2", "ernie4_5", "exaone4", "glm", "glm4", "gpt_bigcode", "granitemoe", "jamba",
    "nemotron", "olmoe", "persimmon", "stablelm", "xglm",
)  # fmt: skip
"""Types that docs/auto.md lists as verified."""


@pytest.mark.parametrize("model_type", [pytest.param(name, marks=pytest.mark.slow) for name in UNDECLARED])
@pytest.mark.filterwarnings("ignore")
def test_what_is_derived_keeps_every_law_as_a_plugin_too(model_type, tmp_path):
    config = tiny_config(model_type)
    (tmp_path / "derived.yaml").write_text(as_yaml(derive(config)))
    check_adapter(load_family(tmp_path / "derived.yaml"), forms=["default"])
    check_adapter(Auto(), config)


def test_a_class_without_a_default_number_of_key_value_heads():
    options = {"forms": ["default", "multi-head"], "checks": ["sliced is masked", "save and load"]}
    assert all(outcome.passed for outcome in conformance(Auto(), "nemotron", **options))


def test_a_form_that_is_refused_is_no_failure():
    outcomes = list(conformance(Auto(), "stablelm", forms=["default", "norms of heads"], checks=["sliced is masked"]))
    assert [(outcome.form, outcome.passed, outcome.refused) for outcome in outcomes] == [
        ("default", True, False),
        ("norms of heads", True, True),
    ]


def test_a_model_that_cannot_be_built_is_refused():
    with pytest.raises(ModelError, match="cannot build a model of type 'nemotron': TypeError"):
        tiny_model(tiny_config("nemotron", num_key_value_heads=None))
