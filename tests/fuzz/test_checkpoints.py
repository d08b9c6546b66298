"""A checkpoint that somebody changed: loaded as it is, or refused in words, in little memory, and without its code."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from conftest import make_llama
from fuzzing import VALUES, cases, damaged, header_of, judge, put_back, tampered, with_header
from hypothesis import given
from hypothesis import strategies as st

import flapkit
from flapkit.checkpoint.load import load_config
from flapkit.system.errors import ModelError

WEIGHTS = "model.safetensors"


def test_weights_whose_header_was_changed(dense):
    content = (dense / WEIGHTS).read_bytes()
    header, data = header_of(content)
    few = {name: entry for name, entry in header.items() if "layers" not in name or name.endswith("norm.weight")}
    others = {name: entry for name, entry in header.items() if name not in few}
    odd = st.sampled_from(
        ["F32", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "U64", "X", [0, 2**63], [32, 96], [2**62], [-1]]
    )
    lengths = st.none() | st.sampled_from([0, 1, 8, 2**31, 2**63, 2**64 - 1])

    @cases(400)
    @given(tampered(few, odd | VALUES), lengths, st.integers(0, len(data)))
    def check(changed, length, cut):
        tree = {**changed, **others} if isinstance(changed, dict) else changed
        (dense / WEIGHTS).write_bytes(with_header(tree, data if cut % 2 else data[:cut], length))
        judge(dense)

    with put_back(dense / WEIGHTS):
        check()


@pytest.mark.parametrize(
    "first", [b"", b"\0" * 8, b"\xff" * 8, b"\x10" + b"\0" * 7 + b"{" * 16, struct.pack("<Q", 99_999_999)]
)
def test_weights_that_are_none(dense, first):
    content = (dense / WEIGHTS).read_bytes()
    for rest in (b"", content[8:], b"[" * 100_000):
        with put_back(dense / WEIGHTS, first + rest), pytest.raises(ModelError, match="damaged or incomplete"):
            flapkit.load(dense)


def test_bytes_of_weights_that_were_changed(pruned):
    content = (pruned / WEIGHTS).read_bytes()

    @cases(400)
    @given(st.integers(0, 4000), st.binary(min_size=1, max_size=8), st.sampled_from(["within", "over", "cut"]))
    def check(place, patch, how):
        (pruned / WEIGHTS).write_bytes(damaged(content, (place, patch, how)))
        judge(pruned)

    with put_back(pruned / WEIGHTS):
        check()


INDEX = "model.safetensors.index.json"
SHARDS = st.sampled_from(
    [
        "../outside.safetensors",
        "/etc/passwd",
        "..",
        "",
        ".",
        "a/../../outside.safetensors",
        "\0",
        "a" * 300,
        5,
        None,
        ["x"],
    ]
)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """A checkpoint in shards, and one of them outside it as well."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    make_llama().save_pretrained(folder, max_shard_size="20KB")
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "outside.safetensors")
    return folder


def test_an_index_that_was_changed(sharded):
    content = (sharded / INDEX).read_text()

    @cases(200)
    @given(tampered(json.loads(content), SHARDS | VALUES))
    def check(tree):
        (sharded / INDEX).write_text(json.dumps(tree))
        judge(sharded)

    with put_back(sharded / INDEX):
        check()


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/outside.safetensors", "x/../../outside.safetensors"])
def test_shards_outside_the_checkpoint_are_not_read(sharded, shard):
    index = json.loads((sharded / INDEX).read_text())
    outside = str(sharded.parent / "outside.safetensors") if shard.startswith("/") else shard
    index["weight_map"] = dict.fromkeys(index["weight_map"], outside)
    for content in (json.dumps(index), "{", "[]", '{"weight_map": [1]}', "[" * 100_000, "\ufeff{}"):
        with put_back(sharded / INDEX, content), pytest.raises(ModelError, match=f"{INDEX} is damaged"):
            flapkit.load(sharded)


CODE = [{"attn_implementation": "kernels-community/flash-attn2"}, {"_attn_implementation": "nobody/kernel@main:f"}]
CODE += [{"auto_map": {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"}, "model_type": "unheard-of"}]
CODE += [{"experts_implementation": "nobody/kernel"}]


@pytest.mark.parametrize("change", CODE)
def test_code_that_comes_with_a_checkpoint_is_not_run(dense, change):
    config, trap = dense / "config.json", "raise SystemExit('the trap was run')\n"
    changed = json.dumps({**json.loads(config.read_text()), **change})
    with put_back(dense / "trap.py", trap), put_back(config, changed):
        for reader in (load_config, flapkit.load):
            with pytest.raises(ModelError, match="does not run code that comes with a model"):
                reader(dense)
