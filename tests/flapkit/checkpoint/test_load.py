from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_llama
from huggingface_hub import constants

import flapkit
from flapkit.checkpoint.load import load
from flapkit.system.errors import ModelError


@pytest.fixture
def folder(tmp_path) -> Path:
    make_llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def refused(path, message):
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert caught.value.exit_code == 2


def test_missing_folder(tmp_path):
    refused(tmp_path / "none", "folder not found")
    refused("./none/at/all", "folder not found")


def test_unknown_builtin():
    refused("builtin:tiny-lama", "did you mean 'builtin:tiny-llama'")


def test_a_file(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    refused(tmp_path / "model.bin", "this is a file; give a .gguf file, or the folder")


def test_no_configuration(folder):
    (folder / "config.json").unlink()
    refused(folder, r"has no config\.json")


def test_no_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()
    refused(folder, "has no weights")
    (folder / "consolidated.00.pth").write_bytes(b"")
    refused(folder, "the weights are pickled")


def test_pickled_weights_are_refused_with_the_command_that_converts_them(folder):
    expected = flapkit.load(folder).state_dict()
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(expected, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="the weights are pickled") as caught:
        flapkit.load(folder)
    program, option, code = shlex.split(str(caught.value).partition("of the file): ")[2])
    assert (program, option) == ("python", "-c")
    done = subprocess.run([sys.executable, option, code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = flapkit.load(folder).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_hub_model_without_safetensors(monkeypatch):
    """transformers' message of such a model, which no test downloads."""
    message = "owner/it's does not appear to have a file named x and thus cannot be loaded with `safetensors`. Please"

    def fail(*_, **__):
        raise OSError(message)

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", fail)
    with pytest.raises(ModelError) as caught:
        flapkit.load("owner/it's")
    code = shlex.split(str(caught.value).partition("that it has: ")[2])[2]
    compile(code, "", "exec")
    assert 'AutoTokenizer.from_pretrained("owner/it\'s").save_pretrained("it\'s")' in code


def test_truncated_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(folder, f"{shard.name} is damaged or incomplete")


def test_corrupt_header(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(b"\xff" * 64)
    refused(folder, f"{shard.name} is damaged or incomplete")


def test_missing_shard(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.unlink()
    refused(folder, f"{shard.name} is missing")


def test_missing_weight(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = sorted(set(content["weight_map"].values()))[-1]
    kept = {name: file for name, file in content["weight_map"].items() if file != last}
    index.write_text(json.dumps({**content, "weight_map": kept}))
    refused(folder, "missing weights: ")


def test_wrong_shapes(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    refused(folder, "cannot be loaded")


def test_hub_id_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("nobody/no-such-model", "cannot be loaded")


def test_quantised(folder):
    config = json.loads((folder / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(quantised))
    refused(folder, "quantised")


def test_copy_of_bundled_loads(tmp_path):
    from flapkit.checkpoint.bundled import bundled_models

    shutil.copytree(bundled_models()["tiny-llama"], tmp_path / "copy")
    assert load(tmp_path / "copy").num_parameters() == load("builtin:tiny-llama").num_parameters()


@pytest.mark.parametrize("rope", ["yarn", "dynamic", "longrope"])
@torch.no_grad()
def test_rotary_embeddings_that_read_the_configuration(tokens, probe, tmp_path, rope):
    """Some kinds derive a head's size from the number of heads, which differs over the layers."""
    parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 8}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}
    model = make_llama(rope_parameters=parameters)
    flapkit.save(model, tmp_path / "pruned", flapkit.prune_(model, tokens, ratio=0.4))
    for part in (probe, probe[:, :6]):
        assert torch.equal(flapkit.load(tmp_path / "pruned")(part).logits, model(part).logits)


@torch.no_grad()
def test_a_device_map_and_a_type(pruned_folder, probe):
    pytest.importorskip("accelerate")
    model = load(pruned_folder, torch.bfloat16, device_map={"": "cpu"})
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(model(probe).logits, load(pruned_folder, "bfloat16")(probe).logits)
