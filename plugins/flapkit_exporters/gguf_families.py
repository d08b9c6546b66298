"""The families that llama.cpp can run with layers of different sizes, and their tensors in its architectures.

llama.cpp reads the heads and the width of each layer in few architectures. Two of them are written: ``deci`` computes
what LLaMA computes, ``openelm`` what Qwen 3 does (``src/models/`` in llama.cpp; read in llama-cpp-python 0.3.36).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flapkit.interfaces import ModelError, Prospect
from flapkit_exporters.padding import Sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LAYERS = "model.layers."
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

DECI, OPENELM = "deci", "openelm"

ARCHITECTURES: Mapping[str, str] = {
    "llama": DECI,
    "mistral": DECI,
    "qwen2": DECI,
    "seed_oss": DECI,
    "granite": DECI,
    "phi3": DECI,
    "qwen3": OPENELM,
}
"""Families -> llama.cpp's architecture that computes the same, with layers of different sizes."""

OWN: Mapping[str, str] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Families whose own architecture can be written -> llama.cpp's name of it."""

PAIRED = (DECI, "llama")
"""Architectures whose rotary embedding turns pairs of rows, not halves."""

ALIKE = "in its own architecture, all layers are alike"
REASONS: Mapping[str, str] = {
    "gemma": f"{ALIKE}, and `deci` computes SiLU, not GELU",
    "gemma2": f"{ALIKE}, and `deci` has no norm after an attention or an MLP",
    "gemma3_text": f"{ALIKE}, and `deci` has no norm after an attention or an MLP",
    "smollm3": f"{ALIKE}, and `deci` has no layers without rotary embedding",
    "olmo2": f"{ALIKE}, and `deci` has no norm after an attention or an MLP",
}
"""Families that llama.cpp runs, but not with layers of different sizes -> why."""


def check_family(family: str, config: PreTrainedConfig, *, own: bool) -> None:
    """Raise ``ModelError`` if no architecture of llama.cpp holds a model of a family.

    Args:
        family: dense model type.
        config: the model's configuration.
        own: whether it is to be written in its own architecture.
    """
    if family not in ARCHITECTURES:
        reason = f" ({REASONS[family]})" if family in REASONS else ""
        raise ModelError(
            f"export gguf: llama.cpp has no architecture with layers of different sizes for {family!r} models{reason}; "
            f"known: {', '.join(ARCHITECTURES)}; if all layers have the same size, export to hf-stock and convert the "
            "result with llama.cpp's convert_hf_to_gguf.py"
        )
    if own and family not in OWN:
        raise ModelError(f"export gguf: architecture `own` is written for {', '.join(OWN)}, not for {family!r}")
    if config.hidden_act not in ("silu", "swish"):
        raise ModelError(f"export gguf: llama.cpp's `deci` supports silu only, not {config.hidden_act}")
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        raise ModelError(
            f"export gguf: llama.cpp's `deci` has no sliding window (here {window} tokens); set sliding_window to "
            "null in config.json and use texts shorter than the window"
        )


def check_openelm(prospect: Prospect) -> None:
    """Raise ``ModelError`` for what ``openelm`` lacks: biases, a head of its own, scaled rotary embeddings."""
    config, where = prospect.config, f"export gguf: llama.cpp's `openelm`, for {prospect.family!r} models,"
    if prospect.biases or getattr(config, "attention_bias", False):
        raise ModelError(
            f"{where} has no biases; prune with compensator none, or {{name: least_squares, intercept: false}}"
        )
    if not config.tie_word_embeddings:
        raise ModelError(
            f"{where} uses the embeddings as head, but this model has a head of its own; prune all layers equally "
            "(searcher ul_um), and set architecture: own"
        )
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ModelError(f"{where} has no rotary embedding of type {kind!r}")


def parts_of(name: str) -> tuple[int | None, str, str]:
    """Split a tensor's name: its layer, or None; its module there; and its own name."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith(LAYERS):
        return None, module, leaf
    layer, _, module = module.removeprefix(LAYERS).partition(".")
    return int(layer), module, leaf


def as_llama(
    prospect: Prospect, tensors: Iterable[tuple[str, Tensor]], attention: Sequence[Sizes]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a LLaMA that computes the same: Phi's fused ones are split, Granite's factors multiplied in.

    Args:
        prospect: the model.
        tensors: its tensors by name.
        attention: the heads of each layer.
    """
    for name, tensor in tensors:
        layer, module, _ = parts_of(name)
        if layer is not None and module == "self_attn.qkv_proj":
            heads, kv_heads = attention[layer]["H"], attention[layer]["K"]
            blocks = tensor.unflatten(0, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads])
            for part, rows in zip("qkv", blocks, strict=True):
                yield name.replace("qkv_proj", f"{part}_proj"), rows.flatten(0, 1)
        elif module == "mlp.gate_up_proj":
            for part, rows in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                yield name.replace("gate_up_proj", part), rows
        elif prospect.family == "granite":
            yield name, tensor * granite_factor(prospect.config, module)
        else:
            yield name, tensor


def fused(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Fuse the weights of queries, keys and values, as ``openelm`` has them."""
    waiting: dict[int | None, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        layer, module, _ = parts_of(name)
        if module not in QKV:
            yield name, tensor
            continue
        found = waiting.setdefault(layer, {})
        found[module] = tensor
        if len(found) == len(QKV):
            yield f"{LAYERS}{layer}.self_attn.qkv_proj.weight", torch.cat([found[part] for part in QKV])
            del waiting[layer]


def granite_factor(config: PreTrainedConfig, module: str) -> float:
    """Return what the tensors of a module of Granite are multiplied by, so that a LLaMA computes the same.

    Granite scales embeddings, what attention and MLP add, the products of queries and keys, and logits.
    """
    if module == "model.embed_tokens":
        return float(config.embedding_multiplier)
    if module == "model.norm":
        # The head is linear, and where it is the embeddings, it has their factor.
        tied = config.embedding_multiplier if config.tie_word_embeddings else 1.0
        return float(1 / (config.logits_scaling * tied))
    if module in ("self_attn.o_proj", "mlp.down_proj"):
        return float(config.residual_multiplier)
    if module == "self_attn.q_proj":
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return float(config.attention_multiplier * math.sqrt(width))
    return 1.0
