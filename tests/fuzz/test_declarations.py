"""An architecture's declaration that somebody changed: it describes a model, or is refused in words; no code is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_llama
from fuzzing import TEXT, VALUES, cases, read, tampered
from hypothesis import example, given
from hypothesis import strategies as st

from flapkit.model.declaration import evaluate
from flapkit.model.empty import skeleton
from flapkit.model.layout import sites_of
from flapkit.recipe.plugin_files import load_family

ATTENTION = {
    "kind": "attention",
    "path": "self_attn",
    "consumer": "o_proj",
    "parameters": {"q_proj": "q", "k_proj": "k", "v_proj": "k", "q_norm?": "q"},
    "attributes": {"num_key_value_groups": "H//K"},
    "reads": {"num_heads": "H"},
    "arguments": {"position_bias": 1},
    "outputs": {"k_norm": "k"},
    "kv_heads": "num_key_value_heads",
    "heads": "num_attention_heads",
}
MLP = {"kind": "mlp", "path": "mlp", "consumer": "down_proj", "parameters": {"gate_proj": "i", "up_proj": "i"}}
FAMILY: dict[str, Any] = {
    "name": "mine",
    "model_types": ["llama"],
    "layers": "model.layers",
    "about": "x",
    "blocks": [ATTENTION, {**MLP, "optional": True}],
}
NAMES = st.sampled_from(
    ["", "mlp", "self_attn", "o_proj", "q_proj.weight", "model", "model.norm", "experts", "i", "q+k", "(q+k+k)", "H*9"]
)
NAMES |= st.sampled_from(["__class__", "forward", "train", "..", "H//0", "9**9", "H-K", "K//H", "(H)", "H if K else H"])


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("declarations") / "mine.yaml"


@pytest.fixture(scope="module")
def model() -> Any:
    return skeleton(make_llama(num_hidden_layers=1, num_key_value_heads=2).config)


@cases(320)
@given(tampered(FAMILY, NAMES | VALUES))
@example(FAMILY)
@example({**FAMILY, "blocks": [{**ATTENTION, "path": ""}]})
@example({**FAMILY, "blocks": [{**MLP, "kind": "experts"}]})
@example({**FAMILY, "blocks": [{**MLP, "parameters": {"act_fn": "i"}}]})
@example({**FAMILY, "blocks": [{**ATTENTION, "kv_heads": 0}]})
@example({**FAMILY, "layers": ""})
def test_a_declaration_that_was_changed(file, model, tree):
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    family = read(lambda: load_family(file), str(file))
    if family is not None:
        for site in read(lambda: sites_of(model, family)) or ():
            assert site.units > 0
            assert site.channels == site.units * site.channels_per_unit


PIECES = [*"HKID+*-()019,.[]' :", "//", "**", "999999999", "lambda", "__import__", "x"]


@cases(200)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | TEXT)
@example("(" * 99)
@example("9" * 100)
@example("*".join(["99999999999999"] * 6))
def test_an_expression_of_pieces(text):
    try:
        assert isinstance(evaluate(text, {"H": 4, "K": 2, "D": 8}), int)
    except ValueError as error:
        assert len(str(error)) > 10  # noqa: PT017 - both ways are right
