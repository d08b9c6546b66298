"""Rotary embeddings in GGUF, of all kinds that llama.cpp can compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from flapkit.interfaces import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STATIC = ("default", "linear", "llama3", "yarn")
"""Kinds whose frequencies do not depend on the text's length."""


def add_rope(writer: Any, config: PreTrainedConfig, width: int) -> None:
    """Write the rotary embedding's parameters, computed by transformers' functions.

    llama.cpp divides each frequency by a given factor, and scales the rotated values. This is exact for all kinds with
    constant frequencies.

    Args:
        writer: a ``gguf.GGUFWriter``.
        config: the model's configuration.
        width: channels of a head.

    Raises:
        ModelError: llama.cpp does not support this kind of rotary embedding.
    """
    import gguf
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config.rope_parameters
    kind, base = rope.get("rope_type", "default"), float(rope["rope_theta"])
    plain = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    writer.add_rope_freq_base(base)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("export gguf: llama.cpp's `deci` rotates whole heads; this model rotates part of each head")
    if kind == "default":
        return
    if kind in STATIC:
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_attn_factors(scale)
        writer.add_tensor("rope_freqs.weight", (plain / frequencies.double()).float().numpy())
    elif kind == "longrope":
        original = rope["original_max_position_embeddings"]
        _, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=original + 1)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(scale)
        for length in ("long", "short"):
            factors = torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors.numpy())
    else:
        raise ModelError(
            f"export gguf: llama.cpp has no rotary embedding of type {kind!r} (known: {', '.join(STATIC)}, longrope)"
        )
