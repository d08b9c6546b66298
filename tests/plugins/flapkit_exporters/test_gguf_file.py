"""GGUF files, run by llama.cpp itself."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import FORMS, make_llama, write_recipe
from transformers import Gemma2Config, LlamaConfig, MistralConfig

import flapkit
from flapkit.checkpoint.export import export
from flapkit.checkpoint.formats import Prospect
from flapkit.checkpoint.load import load_tokenizer
from flapkit.registry import EXPORTER, Registry
from flapkit.system.errors import InputError, ModelError

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.1, 1.2, 1.3, 1.4],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 1024,
}
ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    "yarn": YARN,
    "yarn, scaled": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
    "longrope": LONGROPE,
}
slow = pytest.mark.slow


def gguf(**options):
    return Registry.load().create(EXPORTER, "gguf", options)


def saved(tokens, folder, **options):
    model = make_llama(**options)
    flapkit.save(model, folder, flapkit.prune_(model, tokens, ratio=0.4))
    return folder


@slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_llama_cpp(tokens, tmp_path, form):
    found = export(saved(tokens, tmp_path / "pruned", **FORMS[form]), gguf(type="F32"), tmp_path / "out.gguf")
    assert found.relative < 1e-5
    assert found.greedy == found.continued


@slow
@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_in_llama_cpp(tokens, tmp_path, rope):
    options = {"rope_parameters": ROPES[rope], "max_position_embeddings": 4096 if rope == "longrope" else 64}
    found = export(saved(tokens, tmp_path / "pruned", **options), gguf(type="F32"), tmp_path / "out.gguf")
    assert found.relative < 1e-5


@slow
def test_a_rope_that_llama_cpp_has_not(tokens, tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ModelError, match="no rotary embedding of type 'dynamic'"):
        export(saved(tokens, tmp_path / "pruned", rope_parameters=rope), gguf(), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@slow
@pytest.mark.parametrize("type_", ["F16", "BF16", "Q8_0", "Q4_K_M"])
def test_types(pruned_folder, tmp_path, type_, caplog):
    found = export(pruned_folder, gguf(type=type_), tmp_path / "out.gguf")
    assert 0 < found.relative < 0.5
    assert ("not multiples of" in caplog.text) == type_.startswith("Q")


@slow
def test_zeros_compute_nothing_and_fill_the_rows(pruned_folder, tmp_path, caplog):
    import gguf as package

    found = export(pruned_folder, gguf(type="F32", pad_to=32), tmp_path / "out.gguf")
    assert found.relative < 1e-5
    tensors = {tensor.name: tensor for tensor in package.GGUFReader(tmp_path / "out.gguf").tensors}
    for layer in (0, 1):
        assert tensors[f"blk.{layer}.ffn_down.weight"].shape[0] % 32 == 0
        assert tensors[f"blk.{layer}.attn_output.weight"].shape[0] % 32 == 0
    export(pruned_folder, gguf(type="Q8_0", pad_to=32), tmp_path / "q.gguf")
    assert "not multiples of" not in caplog.text


@slow
@pytest.mark.parametrize("ratio", [0.2])
def test_the_bundled_tokenizer_reads_alike(tokens, tmp_path, ratio, caplog):
    model = flapkit.load("builtin:tiny-llama", "float32")
    tokenizer = load_tokenizer("builtin:tiny-llama")
    flapkit.save(model, tmp_path / "pruned", flapkit.prune_(model, tokens, ratio=ratio), tokenizer=tokenizer)
    with caplog.at_level(logging.WARNING):
        found = export(tmp_path / "pruned", gguf(type="F32"), tmp_path / "out.gguf")
    assert found.relative < 1e-4
    assert "reads" not in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma2Config(num_hidden_layers=1), "no architecture with layers of different sizes for 'gemma2'"),
        (MistralConfig(num_hidden_layers=1, sliding_window=64), "no sliding window"),
        (MistralConfig(num_hidden_layers=1, sliding_window=None, hidden_act="gelu"), "supports silu only"),
    ],
)
def test_what_llama_cpp_cannot_is_refused_before_the_run(config, message):
    prospect = Prospect(config.model_type, config, (), True, frozenset())
    with pytest.raises(ModelError, match=message):
        gguf().check(prospect)


SMOLLM2 = LlamaConfig(num_hidden_layers=1, hidden_size=576, num_attention_heads=9, num_key_value_heads=3)


@pytest.mark.parametrize(
    ("config", "options", "multiple_of", "warnings"),
    [
        (LlamaConfig(num_hidden_layers=1), {"type": "F16"}, 1, []),
        (LlamaConfig(num_hidden_layers=1), {"type": "Q8_0"}, 1, ["MLP widths may not be multiples of 32"]),
        (LlamaConfig(num_hidden_layers=1), {"type": "Q8_0"}, 32, []),
        (LlamaConfig(num_hidden_layers=1), {"type": "Q8_0", "pad_to": 64}, 1, []),
        (LlamaConfig(num_hidden_layers=1), {"type": "Q4_K_M"}, 256, []),
        (LlamaConfig(num_hidden_layers=1), {"type": "Q4_K_M"}, 64, ["MLP widths may not", "attention outputs (heads"]),
        (SMOLLM2, {"type": "Q4_K_M"}, 256, ["attention outputs (heads", "hidden size 576 is not a multiple of 256"]),
    ],
)
def test_blocks_that_divide_no_width_are_warned_of_before_the_run(config, options, multiple_of, warnings, caplog):
    sites = Registry.load().adapter_for(config).sites(config)
    gguf(**options).check(Prospect("llama", config, sites, False, frozenset(), multiple_of))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(warnings)
    assert all(part in message for part, message in zip(warnings, said, strict=True))


def test_flapkit_check_shows_such_a_warning(command, tmp_path, monkeypatch):
    monkeypatch.setattr(type(gguf()), "packages", ())
    write_recipe(tmp_path, export=[{"name": "gguf", "type": "Q8_0"}])
    code, out, _ = command("check", "recipe.yaml")
    assert code == 0
    assert "set budget.multiple_of: 32" in " ".join(out.split())
    _, out, _ = command("check", "recipe.yaml", "--set", "export.0.pad_to=32")
    assert "may not be multiples" not in out


def test_a_missing_package(pruned_folder, tmp_path, without):
    without("gguf", "llama_cpp")
    with pytest.raises(InputError, match=r"needs gguf and llama_cpp.*flapkit\[gguf\]"):
        export(pruned_folder, gguf(), tmp_path / "out.gguf")
    with pytest.raises(InputError, match="needs gguf; install"):
        export(pruned_folder, gguf(verify=False), tmp_path / "out.gguf")


def test_an_unknown_type():
    with pytest.raises(InputError, match="option 'type'"):
        gguf(type="Q9")


@slow
@torch.no_grad()
def test_perplexity_is_the_same(tokens, tmp_path):
    """Text in windows, measured by both: what counts is that llama.cpp's logits are those of every position."""
    folder = saved(tokens, tmp_path / "pruned")
    exporter = gguf(type="F32")
    export(folder, exporter, tmp_path / "out.gguf")
    model = flapkit.load(folder)
    with exporter.open(tmp_path / "out.gguf") as run:
        for window in tokens[:4]:
            torch.testing.assert_close(run(window), model(window[None]).logits[0], atol=1e-4, rtol=1e-4)
