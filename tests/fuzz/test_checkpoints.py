"""A checkpoint that somebody changed: loaded as it is, or refused in words, in little memory, and without its code."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from conftest import make_llama
from fuzzing import VALUES, cases, judge, tampered
from hypothesis import given
from hypothesis import strategies as st

import flapkit
from flapkit.checkpoint.load import load_config
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import apply_plan_
from flapkit.system.errors import ModelError


def save_dense(folder: Path) -> Path:
    make_llama(num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pruned") / "model"
    model = make_llama(num_hidden_layers=1, num_key_value_heads=2)
    sites = flapkit.sites(model)
    plan = PruningPlan({site.name: tuple(range(site.units - 1)) for site in sites})
    apply_plan_(model, sites, plan, {})
    flapkit.save(model, folder, plan)
    return folder


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + data


WEIGHTS = "model.safetensors"


def test_weights_whose_header_was_changed(dense):
    content = (dense / WEIGHTS).read_bytes()
    header, data = parts(content)
    few = {name: entry for name, entry in header.items() if "layers" not in name or name.endswith("norm.weight")}
    others = {name: entry for name, entry in header.items() if name not in few}
    odd = st.sampled_from(
        ["F32", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "U64", "X", [0, 2**63], [32, 96], [2**62], [-1]]
    )
    lengths = st.none() | st.sampled_from([0, 1, 8, 2**31, 2**63, 2**64 - 1])

    @cases(1000)
    @given(tampered(few, odd | VALUES), lengths, st.integers(0, len(data)))
    def check(changed, length, cut):
        tree = {**changed, **others} if isinstance(changed, dict) else changed
        (dense / WEIGHTS).write_bytes(safetensors(tree, data if cut % 2 else data[:cut], length))
        judge(dense)

    try:
        check()
    finally:
        (dense / WEIGHTS).write_bytes(content)


@pytest.mark.parametrize(
    "first", [b"", b"\0" * 8, b"\xff" * 8, b"\x10" + b"\0" * 7 + b"{" * 16, struct.pack("<Q", 99_999_999)]
)
def test_weights_that_are_none(dense, first):
    content = (dense / WEIGHTS).read_bytes()
    try:
        for rest in (b"", content[8:], b"[" * 100_000):
            (dense / WEIGHTS).write_bytes(first + rest)
            with pytest.raises(ModelError, match="damaged or incomplete"):
                flapkit.load(dense)
    finally:
        (dense / WEIGHTS).write_bytes(content)


def test_bytes_of_weights_that_were_changed(pruned):
    content = (pruned / WEIGHTS).read_bytes()

    @cases(1000)
    @given(st.integers(0, 4000), st.binary(min_size=1, max_size=8), st.integers(0, 2))
    def check(place, patch, cut):
        (pruned / WEIGHTS).write_bytes(content[:place] + patch + content[place + (0, len(patch), 10**9)[cut] :])
        judge(pruned)

    try:
        check()
    finally:
        (pruned / WEIGHTS).write_bytes(content)


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

    @cases(500)
    @given(tampered(json.loads(content), SHARDS | VALUES))
    def check(tree):
        (sharded / INDEX).write_text(json.dumps(tree))
        judge(sharded)

    try:
        check()
    finally:
        (sharded / INDEX).write_text(content)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/outside.safetensors", "x/../../outside.safetensors"])
def test_shards_outside_the_checkpoint_are_not_read(sharded, shard):
    content = (sharded / INDEX).read_text()
    index = json.loads(content)
    outside = str(sharded.parent / "outside.safetensors") if shard.startswith("/") else shard
    index["weight_map"] = dict.fromkeys(index["weight_map"], outside)
    try:
        for damaged in (json.dumps(index), "{", "[]", '{"weight_map": [1]}', "[" * 100_000, "\ufeff{}"):
            (sharded / INDEX).write_text(damaged)
            with pytest.raises(ModelError, match=f"{INDEX} is damaged"):
                flapkit.load(sharded)
    finally:
        (sharded / INDEX).write_text(content)


CODE = [{"attn_implementation": "kernels-community/flash-attn2"}, {"_attn_implementation": "nobody/kernel@main:f"}]
CODE += [{"auto_map": {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"}, "model_type": "unheard-of"}]
CODE += [{"experts_implementation": "nobody/kernel"}]


@pytest.mark.parametrize("change", CODE)
def test_code_that_comes_with_a_checkpoint_is_not_run(dense, change):
    content = (dense / "config.json").read_text()
    (dense / "trap.py").write_text("raise SystemExit('the trap was run')\n")
    (dense / "config.json").write_text(json.dumps({**json.loads(content), **change}))
    try:
        for reader in (load_config, flapkit.load):
            with pytest.raises(ModelError, match="does not run code that comes with a model"):
                reader(dense)
    finally:
        (dense / "config.json").write_text(content)
        (dense / "trap.py").unlink()
