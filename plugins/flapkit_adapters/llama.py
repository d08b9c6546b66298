"""LLaMA: multi-head and grouped-query attention, gated MLP, with and without biases."""

from __future__ import annotations

from dataclasses import dataclass

from flapkit.architecture import Block, Family, FamilyAdapter


@dataclass(frozen=True)
class Llama(FamilyAdapter):
    """LLaMA 1 to 3 and everything of model type ``llama``."""

    name = "llama"
    family = Family(
        name="llama",
        model_types=("llama",),
        layers="model.layers",
        blocks=(
            Block(
                "attention",
                "self_attn",
                "o_proj",
                {"q_proj": "q", "k_proj": "k", "v_proj": "k"},
                attributes={"num_key_value_groups": "H//K"},
            ),
            Block("mlp", "mlp", "down_proj", {"gate_proj": "i", "up_proj": "i"}),
        ),
    )
