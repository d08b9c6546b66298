"""Mixtures of experts: the experts of a layer are stacked in 3-D parameters and have the same width."""

from __future__ import annotations

from dataclasses import replace

from flapkit.interfaces import Block, Family
from flapkit_adapters.llama import ATTENTION, MLP

EXPERTS = Block("experts", "mlp.experts", "down_proj", {"gate_up_proj": "i+i"}, width="moe_intermediate_size")
MIXTURE = Block(
    "mixture",
    "mlp",
    "experts.down_proj",
    {"experts.gate_up_proj": "e", "experts.down_proj_bias?": "e", "gate": "e"},
    attributes={"experts.num_experts": "E", "gate.num_experts": "E"},
    width="num_experts",
    router="gate",
)
"""The same experts, to lose whole ones."""

LATENT = Block(
    "attention",
    "self_attn",
    "o_proj",
    {"q_proj?": "q", "q_b_proj?": "q", "kv_b_proj": "q"},
    attributes={"num_heads": "H"},
    kv_heads="num_attention_heads",
)
"""Multi-head latent attention: all heads share one latent vector, so the KV cache keeps its size."""

DENSE_MLP = replace(MLP, optional=True)
SHARED = Block(
    "mlp", "mlp.shared_experts", "down_proj", {"gate_proj": "i", "up_proj": "i"}, name="shared_experts", optional=True
)
ROUTED = replace(MIXTURE, width="n_routed_experts")
QWEN_MIXTURE = (
    ATTENTION,
    DENSE_MLP,
    EXPERTS,
    MIXTURE,
    replace(SHARED, path="mlp.shared_expert", name="shared_expert", width="shared_expert_intermediate_size"),
)
CORRECTED = replace(ROUTED, parameters={**ROUTED.parameters, "gate.e_score_correction_bias": "e"})

MIXTURES = (
    Family(
        "mixtral",
        ("mixtral",),
        "model.layers",
        (ATTENTION, replace(EXPERTS, width="intermediate_size"), replace(MIXTURE, width="num_local_experts")),
        "Mixtral.",
    ),
    Family(
        "qwen2_moe",
        ("qwen2_moe",),
        "model.layers",
        QWEN_MIXTURE,
        "Qwen 1.5 and 2 with experts and a shared expert.",
    ),
    Family(
        "qwen3_moe",
        ("qwen3_moe",),
        "model.layers",
        (ATTENTION, DENSE_MLP, EXPERTS, replace(MIXTURE, width="num_local_experts")),
        "Qwen 3 with experts.",
    ),
    Family(
        "gpt_oss",
        ("gpt_oss",),
        "model.layers",
        (
            replace(ATTENTION, parameters={**ATTENTION.parameters, "sinks": "q"}),
            replace(
                EXPERTS,
                parameters={"gate_up_proj": "(i+i)", "gate_up_proj_bias": "(i+i)"},
                width="intermediate_size",
            ),
            replace(
                MIXTURE,
                parameters={
                    "experts.gate_up_proj": "e",
                    "experts.gate_up_proj_bias": "e",
                    "experts.down_proj_bias": "e",
                    "router": "e",
                },
                attributes={"experts.num_experts": "E", "router.num_experts": "E"},
                width="num_local_experts",
                router="router",
            ),
        ),
        "gpt-oss, with attention sinks.",
    ),
    *(
        Family(
            model_type,
            (model_type,),
            "model.layers",
            (LATENT, DENSE_MLP, EXPERTS, mixture, replace(SHARED, width="shared_intermediate_size")),
            about,
        )
        for model_type, mixture, about in (
            ("deepseek_v2", ROUTED, "DeepSeek V2, with latent attention and shared experts."),
            ("deepseek_v3", CORRECTED, "DeepSeek V3 and R1, with latent attention and shared experts."),
        )
    ),
)
