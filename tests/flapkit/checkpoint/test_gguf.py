"""A GGUF file is a model like any other."""

from __future__ import annotations

import logging

import gguf
import numpy as np
import pytest
import torch
from conftest import TEXT, make_llama, write_recipe
from transformers import Qwen2Config, Qwen2ForCausalLM

import flapkit
from flapkit.checkpoint.export import export
from flapkit.checkpoint.gguf import dequantised
from flapkit.checkpoint.load import load, load_config, load_tokenizer, open_weights
from flapkit.execution.cache import clear, entries
from flapkit.recipe.load import load_recipe
from flapkit.registry import EXPORTER, Registry
from flapkit.run.check import check
from flapkit.run.evaluate import evaluate_checkpoint
from flapkit.run.pipeline import run
from flapkit.system.errors import ModelError

MESSAGES = [{"role": "user", "content": "ab"}]


def make_qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


def write_gguf(folder, model, type_="F32", name="model.gguf"):
    """Prune a model's MLPs alike in all layers, and export it by flapkit's own exporter; return both."""
    tokens = torch.randint(0, model.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(1))
    plan = flapkit.prune_(model, tokens, searcher="ul_um", compensator="none", ratio=0.2)
    tokenizer = load_tokenizer("builtin:tiny-llama")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    flapkit.save(model, folder / "pruned", plan, tokenizer=tokenizer)
    exporter = Registry.load().create(EXPORTER, "gguf", {"type": type_, "architecture": "own", "verify": False})
    export(folder / "pruned", exporter, folder / name)
    return flapkit.load(folder / "pruned"), folder / name


@pytest.fixture
def qwen2(home):
    return write_gguf(home, make_qwen2())


@pytest.mark.parametrize("make", [make_qwen2, lambda: make_llama(vocab_size=2048, num_key_value_heads=2)])
@torch.no_grad()
def test_the_logits_are_those_of_the_exported_model(make, home, probe):
    expected, file = write_gguf(home, make())
    found = load(file)
    assert type(found).__name__.startswith(("Qwen2", "Llama"))
    torch.testing.assert_close(found(probe).logits, expected(probe).logits, atol=1e-5, rtol=1e-5)


def test_its_tokenizer_and_chat_template_come_with_it(home):
    _, file = write_gguf(home, make_llama(vocab_size=2048))
    found, expected = load_tokenizer(file), load_tokenizer("builtin:tiny-llama")
    for text in (TEXT, "It's 12345 + 3.14;\n\n  größer 日本語"):
        assert found(text)["input_ids"] == expected(text, add_special_tokens=False)["input_ids"]
    assert found.apply_chat_template(MESSAGES, tokenize=False) == "user: ab"


@pytest.mark.parametrize("mode", ["whole", "layerwise"])
def test_it_is_pruned_checked_evaluated_and_exported(qwen2, home, mode):
    model = {"path": ".", "file": "model.gguf"}
    recipe = load_recipe(write_recipe(home, model=model, execution=mode))
    assert check(recipe).params == qwen2[0].num_parameters()
    record = run(recipe)
    evaluated = evaluate_checkpoint("out", recipe, against="model.gguf")
    (measured,) = record.perplexity.values()
    (again,) = evaluated.perplexity.values()
    assert (again["dense"], again["pruned"]) == pytest.approx((measured["dense"], measured["pruned"]), rel=1e-5)
    assert load_tokenizer("out").chat_template == load_tokenizer("model.gguf").chat_template
    export(home / "out", Registry.load().create(EXPORTER, "hf", {}), home / "exported")


def test_it_is_dequantised_once_and_again_when_it_changes(qwen2, cache, caplog):
    caplog.set_level(logging.INFO, "flapkit")
    first = dequantised(qwen2[1])
    assert dequantised(qwen2[1]) == first
    assert caplog.text.count("dequantised to float32") == 1
    (entry,) = entries(cache)
    assert (entry.statistic, entry.model) == ("model", str(qwen2[1]))
    qwen2[1].touch()
    assert dequantised(qwen2[1]) != first
    assert len(clear(cache)) == 2
    assert not entries(cache)


@pytest.mark.parametrize(("type_", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_the_checkpoint_has_the_type_of_the_file(home, type_, dtype):
    _, file = write_gguf(home, make_qwen2(), type_)
    assert load_config(file).dtype == dtype
    assert {tensor.dtype for tensor in open_weights(file).values()} == {dtype}


def test_a_quantised_file(home, probe):
    """Blocks of 32 values with a scale of their own, as llama.cpp's Q8_0."""
    expected, file = write_gguf(home, make_llama(vocab_size=2048, intermediate_size=80, hidden_size=64, head_dim=16))
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(home / "q8.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        values = tensor.data.astype(np.float32)
        matrix = values.ndim == 2 and values.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with torch.no_grad():
        found, wanted = load(home / "q8.gguf")(probe).logits, expected(probe).logits
    assert load_config(home / "q8.gguf").dtype == torch.float32
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.05


def refused(path, message):
    for read in (load, load_config, load_tokenizer, open_weights):
        with pytest.raises(ModelError, match=message):
            read(path)


def test_what_is_no_gguf_file(home):
    (home / "other.gguf").write_bytes(b"PK\x03\x04")
    refused("other.gguf", "not a GGUF file: it does not begin with GGUF")
    refused("./absent.gguf", "file not found")
    refused("absent.gguf", "file not found")


@pytest.mark.parametrize("part", [0.02, 0.5, 0.95])
def test_a_truncated_file(qwen2, part):
    content = qwen2[1].read_bytes()
    qwen2[1].write_bytes(content[: int(len(content) * part)])
    refused(qwen2[1], "damaged or incomplete.*download it again")


def test_an_architecture_that_transformers_cannot_read(home):
    writer = gguf.GGUFWriter(home / "model.gguf", "grok")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused("model.gguf", "architecture 'grok'.*it reads llama, mistral")


def test_a_type_that_cannot_be_dequantised(qwen2, monkeypatch):
    def dequantize(data, kind):
        raise NotImplementedError

    monkeypatch.setattr(gguf, "dequantize", dequantize)
    refused(qwen2[1], "is of the type F32, which the package gguf cannot dequantise; use another file")


def test_own_needs_equal_layers_and_no_added_bias(tokens, home):
    exporter = Registry.load().create(EXPORTER, "gguf", {"type": "F32", "architecture": "own", "verify": False})
    for name, searcher, compensator, message in (
        ("uneven", "al_am", "none", "layers of equal size"),
        ("biased", "ul_um", "bias", "no model.layers.0.mlp.down_proj.bias|no model.layers.0.self_attn.o_proj.bias"),
    ):
        model = make_llama(num_key_value_heads=2)
        plan = flapkit.prune_(model, tokens, searcher=searcher, compensator=compensator, ratio=0.4)
        flapkit.save(model, home / name, plan)
        with pytest.raises(ModelError, match=message):
            export(home / name, exporter, home / f"{name}.gguf")


def test_a_pruned_export_is_no_model_to_prune(pruned_folder, tmp_path):
    exporter = Registry.load().create(EXPORTER, "gguf", {"type": "F32", "verify": False})
    export(pruned_folder, exporter, tmp_path / "out.gguf")
    refused(tmp_path / "out.gguf", "architecture 'deci'.*from its checkpoint")
