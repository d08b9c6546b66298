"""The type that a model computes in, and the type that is written."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from conftest import make_llama
from executions import CHANGES, add_tokenizer, assert_same, load_changed, prune
from safetensors.torch import load_file
from transformers import LlamaConfig

import flapkit
from flapkit.checkpoint.load import open_weights
from flapkit.execution.whole import WholeExecutor
from flapkit.model.precision import convert, round_
from flapkit.model.surgery import copy_sharing_weights
from flapkit.recipe.schema import Model
from flapkit.run.check import check
from flapkit.run.dtypes import choose_dtypes
from flapkit.run.evaluate import evaluate_checkpoint
from flapkit.system.errors import RunError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def half(home):
    """A bfloat16 checkpoint in the folder where commands are run."""
    make_llama(vocab_size=4096).to(torch.bfloat16).save_pretrained("dense")
    add_tokenizer(home / "dense")
    return home


@pytest.mark.parametrize(
    ("stored", "asked", "device", "compute", "saved"),
    [
        ("float16", {}, CPU, "float32", "float16"),
        ("bfloat16", {}, CPU, "float32", "bfloat16"),
        ("bfloat16", {}, GPU, "bfloat16", "bfloat16"),
        ("float32", {}, CPU, "float32", "float32"),
        ("float32", {}, GPU, "float32", "float32"),
        ("float16", {"dtype": "float32"}, GPU, "float32", "float16"),
        ("float16", {"dtype": "float16"}, CPU, "float16", "float16"),
        ("float32", {"dtype": "bfloat16"}, CPU, "bfloat16", "bfloat16"),
        ("float16", {"save_dtype": "float32"}, CPU, "float32", "float32"),
        ("float32", {"save_dtype": "bfloat16"}, CPU, "float32", "bfloat16"),
    ],
)
def test_the_types_of_a_run(stored, asked, device, compute, saved):
    found = choose_dtypes(Model(path="dense", **asked), LlamaConfig(dtype=stored), device)
    assert found.names() == {"stored": stored, "compute": compute, "saved": saved}


@pytest.mark.parametrize("mode", ["whole", "layerwise"])
def test_a_cpu_computes_in_float32_and_writes_the_checkpoints_type(half, mode, monkeypatch, caplog):
    seen = set()
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda self, given: seen.add(self.weight.dtype) or forward(self, given)
    )
    with caplog.at_level(logging.INFO, "flapkit"):
        record = prune(half, "out", execution=mode)
    assert seen == {torch.float32}
    assert "computes in float32; the checkpoint is bfloat16, the pruned one will be bfloat16" in caplog.text
    assert {tensor.dtype for tensor in open_weights(record.output).values()} == {torch.bfloat16}
    assert json.loads((record.output / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((record.output / "flapkit.json").read_text())["dtypes"]["compute"] == "float32"
    files = [
        sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (half / "dense", half / "out")
    ]
    assert files[1] < files[0]


@pytest.mark.parametrize("compensator", ["bias", "least_squares"])
@pytest.mark.parametrize("sequential", [False, True])
def test_both_executors_write_the_same_rounded_weights(half, compensator, sequential):
    """Law 4, where the checkpoint's type is narrower than the one that is computed in."""
    calibration = {**CHANGES["calibration"], "sequential": sequential}
    changes = {"compensator": compensator, "calibration": calibration}
    assert_same(prune(half, "out", **changes), prune(half, "layers", execution="layerwise", **changes), 1e-2)


def test_a_training_leaves_the_checkpoints_type(half):
    (half / "training.txt").write_text("class Other:\n    size = 3\n" * 100)
    lora = {"name": "lora", "rank": 1, "steps": 1, "validate_every": 1, "validation_windows": 1, "length": 8}
    record = prune(half, "out", compensator=["bias", {**lora, "dataset": "training.txt"}], report={"error_windows": 0})
    assert {tensor.dtype for tensor in open_weights(record.output).values()} == {torch.bfloat16}
    params, memory = (next(row for row in record.costs if row["measure"] == name) for name in ("params", "memory"))
    assert memory["detail"] == "bfloat16"
    assert memory["dense"] == 2 * params["dense"]


@pytest.mark.parametrize("mode", ["whole", "layerwise"])
def test_what_is_measured_is_what_is_written(half, mode):
    record = prune(half, "out", execution=mode)
    again = evaluate_checkpoint("out", load_changed(half, "again"))
    for name, measured in record.perplexity.items():
        assert again.perplexity[name]["model"] == pytest.approx(measured["pruned"], rel=1e-6)


def test_check_says_the_types(half):
    checked = check(load_changed(half, "out"))
    assert checked.dtypes.compute == torch.float32
    half_size = check(load_changed(half, "out", model={"path": "dense", "save_dtype": "float32"})).needs.disk / 2
    assert checked.needs.disk == half_size


def test_rounding_leaves_a_copy_that_shares_the_weights():
    dense = make_llama(tie_word_embeddings=True)
    before = copy.deepcopy(dense.state_dict())
    shared = copy_sharing_weights(dense, flapkit.sites(dense))
    round_(shared, torch.bfloat16)
    assert shared.lm_head.weight is shared.model.embed_tokens.weight
    for name, tensor in shared.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name].bfloat16().float())
        assert torch.equal(dense.state_dict()[name], before[name])


def test_a_weight_too_large_for_the_type_is_refused():
    model = make_llama()
    model.lm_head.weight.data[3, 2] = 1e6
    with pytest.raises(
        RunError, match=r"lm_head.weight: its largest value, 1e\+06, is too large for float16.*save_dtype"
    ):
        round_(model, torch.float16)


def test_what_transformers_keeps_in_float32_stays_so():
    model = make_llama()
    model._keep_in_fp32_modules_strict = {"norm"}
    types = {name: tensor.dtype for name, tensor in convert(model, model.state_dict(), torch.bfloat16)}
    assert types["model.norm.weight"] == torch.float32
    assert types["model.layers.0.input_layernorm.weight"] == torch.bfloat16
    assert types["lm_head.weight"] == torch.bfloat16


def test_save_takes_a_type(tokens, tmp_path):
    model = make_llama()
    plan = flapkit.prune_(model, tokens, ratio=0.3)
    flapkit.save(model, tmp_path / "out", plan, dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    assert flapkit.load(tmp_path / "out").dtype == torch.float16


def test_an_executor_writes_its_models_type_by_default():
    assert WholeExecutor(make_llama(), (), None)._saved == torch.float32
