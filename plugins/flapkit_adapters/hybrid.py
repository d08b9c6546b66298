"""Hybrids: models in which only some of the layers have attention; the others keep their states or convolutions."""

from __future__ import annotations

from dataclasses import replace

from flapkit.interfaces import Block, Family
from flapkit_adapters.llama import ATTENTION
from flapkit_adapters.mixtures import CORRECTED, EXPERTS, MIXTURE, QWEN_MIXTURE, SHARED

HYBRIDS = (
    Family(
        "lfm2",
        ("lfm2",),
        "model.layers",
        (replace(ATTENTION, consumer="out_proj"), Block("mlp", "feed_forward", "w2", {"w1": "i", "w3": "i"})),
        "LFM2: short convolutions in most layers, attention in some.",
    ),
    Family(
        "qwen3_next",
        ("qwen3_next",),
        "model.layers",
        QWEN_MIXTURE,
        "Qwen 3 Next: gated delta nets in most layers, which stay; attention in some; experts and a shared expert.",
    ),
    Family(
        "granitemoehybrid",
        ("granitemoehybrid",),
        "model.layers",
        (
            ATTENTION,
            replace(EXPERTS, path="block_sparse_moe.experts", width="intermediate_size", optional=True),
            replace(
                MIXTURE,
                path="block_sparse_moe",
                parameters={"experts.gate_up_proj": "e", "experts.down_proj_bias?": "e", "router": "e"},
                attributes={"experts.num_experts": "E", "router.num_experts": "E"},
                width="num_local_experts",
                router="router",
                optional=True,
            ),
            Block(
                "mlp",
                "shared_mlp",
                "output_linear",
                {"input_linear": "i+i"},
                name="shared_mlp",
                width="shared_intermediate_size",
            ),
        ),
        "Granite 4: Mamba, which is not pruned, in most layers; attention in some; an MLP, and experts in some sizes.",
    ),
    Family(
        "nemotron_h",
        ("nemotron_h",),
        "model.layers",
        (
            replace(ATTENTION, path="mixer", optional=True),
            Block("mlp", "mixer", "down_proj", {"up_proj": "i"}, optional=True),
            replace(EXPERTS, path="mixer.experts", parameters={"up_proj": "i"}, optional=True),
            replace(
                CORRECTED,
                path="mixer",
                parameters={
                    "experts.up_proj": "e",
                    "experts.down_proj_bias?": "e",
                    "gate": "e",
                    "gate.e_score_correction_bias": "e",
                },
                optional=True,
            ),
            replace(
                SHARED,
                path="mixer.shared_experts",
                parameters={"up_proj": "i"},
                width="moe_shared_expert_intermediate_size",
            ),
        ),
        "Nemotron-H: each layer is Mamba, which is not pruned, or attention, or an MLP, or a mixture of experts.",
    ),
)
