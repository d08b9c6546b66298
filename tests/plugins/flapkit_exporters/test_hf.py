from __future__ import annotations

import json

import pytest
import torch

import flapkit
from flapkit.checkpoint.export import export
from flapkit.registry import EXPORTER, Registry


def hf(**options):
    return Registry.load().create(EXPORTER, "hf", options)


@torch.no_grad()
def test_is_the_same_model(pruned_folder, tmp_path, probe):
    found = export(pruned_folder, hf(max_shard_size="20KB"), tmp_path / "out")
    assert found.difference == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert torch.equal(flapkit.load(tmp_path / "out")(probe).logits, flapkit.load(pruned_folder)(probe).logits)
    for name in ("plan.json", "flapkit.json"):
        assert (tmp_path / "out" / name).read_bytes() == (pruned_folder / name).read_bytes()
    assert "AutoModelForCausalLM" in json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_another_type(pruned_folder, tmp_path, dtype):
    found = export(pruned_folder, hf(dtype=dtype), tmp_path / "out")
    assert 0 < found.relative < hf(dtype=dtype).tolerance
    assert flapkit.load(tmp_path / "out").dtype == getattr(torch, dtype)
