"""A checkpoint whose configuration somebody changed: loaded as it is, or refused in words."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from conftest import write_recipe
from fuzzing import VALUES, cases, judge, put_back, read, tampered
from hypothesis import example, given
from hypothesis import strategies as st

import flapkit
from flapkit.checkpoint.bundled import bundled_models
from flapkit.checkpoint.load import load_config
from flapkit.checkpoint.save import fix_generation_config_
from flapkit.model.classes import dense_config
from flapkit.model.declaration import declaration_of
from flapkit.model.empty import skeleton
from flapkit.model.layout import sites_of
from flapkit.recipe.load import LoadedRecipe, load_recipe
from flapkit.registry import Registry
from flapkit.run.check import check as check_recipe
from flapkit.system.errors import ModelError

SIZES = st.sampled_from([10**5, 10**6, 10**9, 10**12, 2**31, 2**63, 10**30, -1, 0, 1, 3, "x", None, [], 1.5, True])
WORDS = st.sampled_from(
    ["llama", "flapkit_llama", "gpt2", "flapkit_gpt2", "t5", "bert", "mamba", "flapkit_", "mistral", "float16", "int8"]
)
ODD = SIZES | WORDS | VALUES
SETTINGS = {
    "bos_token_id": 1,
    "eos_token_id": [2],
    "do_sample": True,
    "temperature": 0.5,
    "top_p": 0.9,
    "max_length": 20,
    "suppress_tokens": [1],
    "cache_implementation": None,
    "_from_model_config": True,
    "transformers_version": "5.0.0",
}
HUGE = [
    {key: 10**12}
    for key in (
        "hidden_size",
        "vocab_size",
        "num_hidden_layers",
        "intermediate_size",
        "head_dim",
        "num_attention_heads",
    )
]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load()


@pytest.fixture(scope="module")
def recipe(dense, registry) -> LoadedRecipe:
    """A recipe that prunes the dense model; the registry is built once."""
    (dense.parent / "text.txt").write_text("some text " * 100)
    shutil.copy(bundled_models()["tiny-llama"] / "tokenizer.json", dense)
    shutil.copy(bundled_models()["tiny-llama"] / "tokenizer_config.json", dense)
    path = write_recipe(
        dense.parent,
        model={"path": str(dense)},
        calibration={"dataset": str(dense.parent / "text.txt"), "samples": 4, "length": 8},
        evaluate={"perplexity": [{"dataset": str(dense.parent / "text.txt"), "length": 8}]},
        compensator=["bias", {"name": "lora", "length": 8, "dataset": "stdlib"}],
        output=str(dense.parent / "out"),
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Registry, "load", classmethod(lambda cls, files=(): registry))
        return load_recipe(path)


def examine(folder: Path, registry: Registry) -> None:
    """Read a configuration as all commands do, and as ``flapkit show`` does."""
    config = read(lambda: load_config(folder), str(folder))
    if config is None:
        return
    read(lambda: registry.adapter_for(config).sites(config))
    if getattr(config, "flapkit", None):
        for each in (lambda: config, lambda: dense_config(config)):
            read(lambda: sites_of(skeleton(each()), declaration_of(config)))  # noqa: B023 - called at once


@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_a_configuration_that_was_changed(request, registry, which):
    path: Path = request.getfixturevalue(which) / "config.json"
    known = json.loads(path.read_text())

    @cases(320)
    @given(tampered(known, ODD, most=2))
    @example({**known, "dtype": 1.5})
    @example({**known, "head_dim": 0})
    @example({**known, "num_attention_heads": 10**5})
    @example({**known, "model_type": "flapkit_gpt2", "hidden_size": math.inf})
    @example({**known, "flapkit": {"blocks": known.get("flapkit", {}).get("blocks", [])}})
    def check(tree):
        path.write_text(json.dumps(tree))
        examine(path.parent, registry)

    with put_back(path):
        check()


@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_a_model_whose_configuration_was_changed(request, which):
    path: Path = request.getfixturevalue(which) / "config.json"
    known = json.loads(path.read_text())

    @cases(60)
    @given(tampered(known, ODD, most=2))
    def check(tree):
        path.write_text(json.dumps(tree))
        judge(path.parent)

    with put_back(path):
        for change in (*HUGE, {"quantization_config": 5}, {"dtype": "nope"}, {"pad_token_id": 10**9}):
            path.write_text(json.dumps({**known, **change}))
            judge(path.parent)
        check()


NUMBERS_FOR_MODULES = [{"num_key_value_groups": "x"}, {"num_key_value_groups": 3}, {}, 5, {"hidden_size": 1}]


@pytest.mark.parametrize("counts", NUMBERS_FOR_MODULES)
def test_what_a_pruned_model_s_modules_are_told_is_what_its_sizes_are(pruned, counts):
    path = pruned / "config.json"
    changed = json.loads(path.read_text())
    changed["per_layer_config"]["0"]["attention_counts"] = counts
    with (
        put_back(path, json.dumps(changed)),
        pytest.raises(ModelError, match=r"its sizes imply \{'num_key_value_groups': 2\}|cannot build a model"),
    ):
        flapkit.load(pruned)


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "hidden_size", "vocab_size", "intermediate_size"])
def test_no_memory_is_taken_for_a_configuration_that_is_not_the_weights_own(dense, key):
    path = dense / "config.json"
    with (
        put_back(path, json.dumps({**json.loads(path.read_text()), key: 10**6})),
        pytest.raises(ModelError, match="but the files contain"),
    ):
        flapkit.load(dense)


@cases(40)
@given(data=st.data())
def test_a_check_of_a_configuration_that_was_changed(recipe, dense, data):
    path = dense / "config.json"
    with put_back(path, json.dumps(data.draw(tampered(json.loads(path.read_text()), ODD, most=2)))):
        read(lambda: check_recipe(recipe), str(dense.parent))


@pytest.mark.parametrize("change", [{"model_type": "t5"}, {"num_key_value_heads": 3}])
def test_a_check_names_the_model(recipe, dense, change):
    path = dense / "config.json"
    with (
        put_back(path, json.dumps({**json.loads(path.read_text()), **change})),
        pytest.raises(ModelError, match=str(dense)),
    ):
        check_recipe(recipe)


@cases(40)
@given(data=st.data())
def test_generation_settings_that_were_changed(dense, tmp_path_factory, data):
    """Those that are read can be saved with what was pruned."""
    path = dense / "generation_config.json"
    with put_back(path, json.dumps(data.draw(tampered(SETTINGS)))):
        model = judge(dense)
        if model is not None:
            fix_generation_config_(model)
            model.generation_config.save_pretrained(tmp_path_factory.getbasetemp() / "settings")


@pytest.mark.parametrize("which", ["dense", "pruned"])
@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", "[" * 100_000, '{"model_type": "llama", "hidden_size": ' + "9" * 5000 + "}", "\ufeff{}"],
    ids=range(7),
)
def test_what_is_no_configuration(request, which, text):
    path: Path = request.getfixturevalue(which) / "config.json"
    with put_back(path, text), pytest.raises(ModelError):
        load_config(path.parent)
