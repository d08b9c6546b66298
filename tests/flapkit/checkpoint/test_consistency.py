"""A checkpoint whose parts were changed is refused, and the part is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import flapkit
from flapkit.system.errors import ModelError


def refused(folder, message):
    with pytest.raises(ModelError, match=message):
        flapkit.load(folder)


def test_a_tensor_of_the_wrong_shape(pruned_folder):
    weights = load_file(pruned_folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name][:, 1:].contiguous()
    save_file(weights, pruned_folder / "model.safetensors", {"format": "pt"})
    refused(pruned_folder, rf"{name} in model\.safetensors has the shape .*, but config\.json implies")


def test_a_tensor_without_a_place(pruned_folder):
    weights = load_file(pruned_folder / "model.safetensors")
    save_file({**weights, "model.extra": torch.zeros(1)}, pruned_folder / "model.safetensors", {"format": "pt"})
    refused(pruned_folder, r"contains model\.extra, which the model does not have")


def test_a_missing_shard(tokens, tmp_path):
    model = flapkit.load("builtin:tiny-llama", "float32")
    flapkit.save(model, tmp_path / "p", flapkit.prune_(model, tokens, ratio=0.2), max_shard_size="2MB")
    shard = sorted((tmp_path / "p").glob("*.safetensors"))[1]
    shard.unlink()
    refused(tmp_path / "p", f"{shard.name} is missing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keep: keep["layers.0.mlp"].pop(), "keeps .* units at layers.0.mlp"),
        (lambda keep: keep["layers.0.mlp"].__setitem__(0, keep["layers.0.mlp"][1]), "layers.0.mlp"),
        (lambda keep: keep.__setitem__("layers.9.mlp", [0]), "names the site layers.9.mlp"),
        (lambda keep: keep.__setitem__("nonsense", [0]), "names the site nonsense"),
        (lambda keep: keep.__setitem__("layers.0.mlp", []), "keeps 0 units"),
        (lambda keep: keep.__setitem__("layers.0.mlp", "all"), "expected a list of whole numbers"),
    ],
)
def test_a_plan_that_was_changed(pruned_folder, change, message):
    plan = json.loads((pruned_folder / "plan.json").read_text())
    change(plan["keep"])
    (pruned_folder / "plan.json").write_text(json.dumps(plan))
    refused(pruned_folder, message)


def test_a_configuration_that_was_changed(pruned_folder):
    config = json.loads((pruned_folder / "config.json").read_text())
    config["per_layer_config"]["0"]["intermediate_size"] += 1
    (pruned_folder / "config.json").write_text(json.dumps(config))
    refused(pruned_folder, "has the shape")
