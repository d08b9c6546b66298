"""LLaMA, and families with the same structure."""

from __future__ import annotations

from dataclasses import dataclass

from flapkit.interfaces import Block, Family, FamilyAdapter

ATTENTION = Block(
    "attention",
    "self_attn",
    "o_proj",
    {"q_proj": "q", "k_proj": "k", "v_proj": "k"},
    attributes={"num_key_value_groups": "H//K"},
)
MLP = Block("mlp", "mlp", "down_proj", {"gate_proj": "i", "up_proj": "i"})


@dataclass(frozen=True)
class Llama(FamilyAdapter):
    """LLaMA 1 to 3, and all models of type llama."""

    name = "llama"
    family = Family("llama", ("llama",), "model.layers", (ATTENTION, MLP))


LIKE_LLAMA = tuple(
    Family(model_type, (model_type,), "model.layers", (ATTENTION, MLP), about)
    for model_type, about in {
        "mistral": "Mistral 7B and its relatives.",
        "qwen2": "Qwen 1.5, 2 and 2.5, with biases on q, k and v.",
        "qwen3": "Qwen 3, with a norm for each head.",
        "gemma": "Gemma; the 2B model has one key/value head.",
        "gemma2": "Gemma 2, with sliding windows and norms after each block.",
        "gemma3_text": "Gemma 3, the language models.",
        "olmo": "OLMo 1.",
        "granite": "Granite 3 and its multipliers.",
        "seed_oss": "Seed-OSS.",
        "smollm3": "SmolLM 3, with some layers without positions.",
        "helium": "Helium.",
    }.items()
)
"""One declaration fits them all: their differences (norms, windows, multipliers, biases) do not affect single heads."""
