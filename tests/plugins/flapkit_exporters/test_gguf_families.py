"""GGUF files of the families, computed as llama.cpp's sources say, without llama.cpp.

``run_file`` is what ``src/models/deci.cpp`` and ``openelm.cpp`` compute. The files are run by llama.cpp itself in
``test_gguf_file.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import GemmaConfig, SmolLM3Config

import flapkit
from flapkit.checkpoint.export import export
from flapkit.checkpoint.formats import Prospect
from flapkit.model.surgery import Correction, apply_plan_
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.model.verify import random_plan
from flapkit.registry import EXPORTER, Registry
from flapkit.system.errors import ModelError

NO_BIAS = ("qwen3",)
FACTORS = {
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    },
    "phi3": {"sliding_window": None},
    "qwen3": {"tie_word_embeddings": True},
}


def run_file(path, tokens):
    """Compute a file's logits [tokens, vocabulary]."""
    import gguf

    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    weights = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}

    def value(name):
        return reader.fields[f"{architecture}.{name}"].contents()

    def normed(x, name):
        return rms_norm(x, weights[name].shape, weights[name], value("attention.layer_norm_rms_epsilon"))

    def linear(x, name):
        y = x @ weights[f"{name}.weight"].T
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y

    size = value("attention.key_length")
    base, places = value("rope.freq_base"), torch.arange(len(tokens))
    angles = places[:, None] * base ** -(torch.arange(0, size, 2) / size)
    cos, sin = angles.cos(), angles.sin()

    def rotated(x):
        pairs = x.unflatten(-1, (-1, 2)) if architecture == "deci" else x.unflatten(-1, (2, -1)).transpose(-1, -2)
        one, other = pairs.unbind(-1)
        turned = torch.stack([one * cos - other * sin, one * sin + other * cos], -1)
        return turned.flatten(-2) if architecture == "deci" else turned.transpose(-1, -2).flatten(-2)

    x = weights["token_embd.weight"][tokens]
    for layer in range(value("block_count")):
        at, heads, kv_heads = (
            f"blk.{layer}",
            value("attention.head_count")[layer],
            value("attention.head_count_kv")[layer],
        )
        h = normed(x, f"{at}.attn_norm.weight")
        if architecture == "openelm":
            parts = linear(h, f"{at}.attn_qkv").unflatten(-1, (-1, size)).split([heads, kv_heads, kv_heads], dim=1)
            q, k = (normed(part, f"{at}.attn_{of}_norm.weight") for part, of in zip(parts, "qk", strict=False))
            v = parts[2]
        else:
            q, k, v = (linear(h, f"{at}.attn_{of}").unflatten(-1, (-1, size)) for of in "qkv")
        assert (q.shape[1], k.shape[1], v.shape[1]) == (heads, kv_heads, kv_heads)
        q, k = (rotated(part.transpose(0, 1)) for part in (q, k))
        out = scaled_dot_product_attention(q, k, v.transpose(0, 1), is_causal=True, enable_gqa=True)
        x = x + linear(out.transpose(0, 1).flatten(1), f"{at}.attn_output")
        h = normed(x, f"{at}.ffn_norm.weight")
        assert weights[f"{at}.ffn_up.weight"].shape[0] == value("feed_forward_length")[layer]
        x = x + linear(silu(linear(h, f"{at}.ffn_gate")) * linear(h, f"{at}.ffn_up"), f"{at}.ffn_down")
    head = "output" if "output.weight" in weights and architecture == "deci" else "token_embd"
    return linear(normed(x, "output_norm.weight"), head)


def gguf(**options):
    return Registry.load().create(EXPORTER, "gguf", {"type": "F32", "verify": False, **options})


def save_pruned(family, folder, **options):
    """Save a tiny random model of a family whose layers differ, with a bias at every consumer that may have one."""
    model = tiny_model(tiny_config(family, **{**FACTORS.get(family, {}), **options}))
    sites = Registry.load().adapter_for(model.config).sites(model.config)
    biases = {} if family in NO_BIAS else {site.name: Correction(bias=torch.randn(site.out_features)) for site in sites}
    apply_plan_(model, sites, random_plan(sites), biases)
    flapkit.save(model, folder)
    return model.eval()


every_family = pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("granite", {"tie_word_embeddings": True}),
        ("granite", {"tie_word_embeddings": False}),
        ("phi3", {}),
        ("qwen3", {}),
    ],
)


@every_family
@torch.no_grad()
def test_a_file_computes_what_the_model_computes(tmp_path, family, options):
    torch.manual_seed(0)
    model = save_pruned(family, tmp_path / "pruned", **options)
    export(tmp_path / "pruned", gguf(), tmp_path / "out.gguf")
    tokens = torch.randint(0, model.config.vocab_size, (12,))
    expected = model(tokens[None]).logits[0]
    torch.testing.assert_close(run_file(tmp_path / "out.gguf", tokens), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
@every_family
def test_llama_cpp_computes_it_too(tmp_path, family, options):
    save_pruned(family, tmp_path / "pruned", **options)
    found = export(tmp_path / "pruned", gguf(verify=True), tmp_path / "out.gguf")
    assert found.relative < 1e-5
    assert found.greedy == found.continued


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GemmaConfig(num_hidden_layers=1), r"'gemma' models \(in its own architecture.*GELU"),
        (SmolLM3Config(num_hidden_layers=1), r"'smollm3' models \(.*without rotary embedding"),
    ],
)
def test_a_family_that_llama_cpp_runs_with_equal_layers_only_is_refused_with_the_reason(config, reason):
    with pytest.raises(ModelError, match=reason):
        gguf().check(Prospect(config.model_type, config, (), True, frozenset()))


@pytest.mark.parametrize(
    ("options", "biases", "message"),
    [
        ({"tie_word_embeddings": True}, {"mlp"}, "has no biases.*intercept: false"),
        ({"tie_word_embeddings": False}, set(), "uses the embeddings as head.*architecture: own"),
        ({"tie_word_embeddings": True}, set(), ""),
    ],
)
def test_what_the_architecture_of_qwen3_lacks_is_refused_before_the_run(options, biases, message):
    config = tiny_config("qwen3", **options)
    prospect = Prospect("qwen3", config, (), False, frozenset(biases))
    if message:
        with pytest.raises(ModelError, match=message):
            gguf().check(prospect)
    else:
        gguf().check(prospect)
