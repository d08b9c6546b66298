"""Families with a structure other than LLaMA's: fused projections, plain MLPs, ALiBi."""

from __future__ import annotations

from flapkit.interfaces import Block, Family
from flapkit_adapters.llama import ATTENTION, MLP

SEPARATE = {"q_proj": "q", "k_proj": "k", "v_proj": "k"}

CLASSIC = (
    Family(
        "phi",
        ("phi",),
        "model.layers",
        (
            Block("attention", "self_attn", "dense", SEPARATE, attributes={"num_key_value_groups": "H//K"}),
            Block("mlp", "mlp", "fc2", {"fc1": "i"}),
        ),
        "Phi 1 to 2.",
    ),
    Family(
        "phi3",
        ("phi3",),
        "model.layers",
        (
            Block(
                "attention",
                "self_attn",
                "o_proj",
                {"qkv_proj": "q+k+k"},
                attributes={"num_key_value_heads": "K", "num_key_value_groups": "H//K"},
                reads={"num_attention_heads": "H"},
            ),
            Block("mlp", "mlp", "down_proj", {"gate_up_proj": "i+i"}),
        ),
        "Phi 3 and 4, with fused projections.",
    ),
    Family(
        "starcoder2",
        ("starcoder2",),
        "model.layers",
        (ATTENTION, Block("mlp", "mlp", "c_proj", {"c_fc": "i"})),
        "StarCoder 2.",
    ),
    Family(
        "cohere",
        ("cohere",),
        "model.layers",
        (
            Block(
                "attention",
                "self_attn",
                "o_proj",
                {**SEPARATE, "q_norm?": "q", "k_norm?": "k"},
                attributes={"num_key_value_groups": "H//K"},
            ),
            MLP,
        ),
        "Command R, with a norm per head in the larger model.",
    ),
    Family(
        "opt",
        ("opt",),
        "model.decoder.layers",
        (
            Block("attention", "self_attn", "out_proj", SEPARATE, attributes={"num_heads": "H"}),
            Block("mlp", "", "fc2", {"fc1": "i"}, width="ffn_dim"),
        ),
        "OPT.",
    ),
    Family(
        "gpt2",
        ("gpt2",),
        "transformer.h",
        (
            Block(
                "attention",
                "attn",
                "c_proj",
                {"c_attn": "q+k+k"},
                attributes={"num_heads": "H", "split_size": "H*D"},
            ),
            Block("mlp", "mlp", "c_proj", {"c_fc": "i"}, width="n_inner"),
        ),
        "GPT-2, whose projections are transposed.",
    ),
    Family(
        "gpt_neo",
        ("gpt_neo",),
        "transformer.h",
        (
            Block("attention", "attn.attention", "out_proj", SEPARATE, attributes={"num_heads": "H"}),
            Block("mlp", "mlp", "c_proj", {"c_fc": "i"}),
        ),
        "GPT-Neo.",
    ),
    Family(
        "gptj",
        ("gptj",),
        "transformer.h",
        (
            Block("attention", "attn", "out_proj", SEPARATE, attributes={"num_attention_heads": "H"}),
            Block("mlp", "mlp", "fc_out", {"fc_in": "i"}, width="n_inner"),
        ),
        "GPT-J.",
    ),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        "gpt_neox.layers",
        (
            Block("attention", "attention", "dense", {"query_key_value": "(q+k+k)"}),
            Block("mlp", "mlp", "dense_4h_to_h", {"dense_h_to_4h": "i"}),
        ),
        "GPT-NeoX and Pythia.",
    ),
    Family(
        "bloom",
        ("bloom",),
        "transformer.h",
        (
            Block(
                "attention",
                "self_attention",
                "dense",
                {"query_key_value": "(q+k+k)"},
                attributes={"num_heads": "H"},
                arguments={"alibi": 0},
            ),
            Block("mlp", "mlp", "dense_4h_to_h", {"dense_h_to_4h": "i"}),
        ),
        "BLOOM, with ALiBi.",
    ),
    Family(
        "mpt",
        ("mpt",),
        "transformer.blocks",
        (
            Block(
                "attention",
                "attn",
                "out_proj",
                {"Wqkv": "q+k+k"},
                attributes={"n_heads": "H"},
                arguments={"position_bias": 0},
            ),
            Block("mlp", "ffn", "down_proj", {"up_proj": "i"}),
        ),
        "MPT, with ALiBi.",
    ),
)
