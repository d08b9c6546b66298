"""Every default family keeps every law; here a sample, and all of them with ``-m slow``."""

from __future__ import annotations

from pathlib import Path

import pytest

from flapkit.registry import Registry
from flapkit.testing import check_adapter, conformance

PAGE = Path(__file__).parents[3] / "docs" / "families.md"
NAMES = [name for name in Registry.load().names("adapter") if name not in ("auto", "vicuna")]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_every_law(name):
    check_adapter(Registry.load().create("adapter", name))


@pytest.mark.parametrize("name", ["gpt2", "bloom", "olmo2", "gpt_oss"])
def test_a_sample(name):
    laws = ["counts", "constant channels", "ratio 0", "save and load", "generate", "trains"]
    check_adapter(Registry.load().create("adapter", name), forms=["as it is"], laws=laws)


def test_falcon_has_three_layouts():
    forms = {each.form for each in conformance(Registry.load().create("adapter", "falcon"), laws=["counts"])}
    assert {"as it is", "grouped heads", "ALiBi"} <= forms


def test_the_page_names_every_family():
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in NAMES if f"| `{name}` |" not in page] == []
    assert "no:" not in page
