"""Tiny random models of any class, on which declarations are verified."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flapkit.model.classes import dense_config
from flapkit.model.empty import config_of, from_config
from flapkit.system.errors import ModelError, closest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SIZES: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "num_hidden_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "ffn_dim": 24,
    "ffn_hidden_size": 24,
    "n_inner": 24,
    "expansion_ratio": 1,
    "rotary_dim": 4,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "window_size": 8,
    "attention_types": [[["global", "local"], 1]],
    "attention_layers": ["global", "local"],
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "query_pre_attn_scalar": 8,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
"""Sizes of a tiny model by configuration entry; a configuration class uses the entries that it has."""

VISION: Mapping[str, int] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
"""Sizes of a tiny vision tower, by configuration entry."""

UNTYPED = ("model_type", "transformers_version")
"""Entries of a configuration as plain data that its class does not take."""

LAYERS = {
    "lfm2": ["conv", "full_attention"],
    "granitemoehybrid": ["linear_attention", "full_attention"],
    "nemotron_h": ["linear_attention", "full_attention", "mlp", "moe"],
}
"""Model type -> layer types, for hybrids whose default configuration lacks one of them."""

PATTERNS = ("attention_types",)
"""Configuration entries that say how often a pattern of layers occurs."""

UNSET = ("n_inner", "num_experts_per_tok", "num_key_value_heads")
"""Sizes that may be None in a default configuration, but not in a tiny model's."""

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def tiny_config(of: str | PreTrainedConfig, **changes: Any) -> PreTrainedConfig:
    """Make a tiny configuration of a class.

    Args:
        of: a model type, or a configuration, whose entries other than sizes are kept.
        changes: entries to set.

    Raises:
        ModelError: transformers does not know the model type, or its class does not accept the sizes.
    """
    import transformers

    if not isinstance(of, str):
        # A pruned model's layers differ; a tiny one of its kind is dense.
        of = dense_config(of)
    if isinstance(of, str):
        if of not in transformers.CONFIG_MAPPING:
            close = closest(of, transformers.CONFIG_MAPPING)
            raise ModelError(f"transformers has no model type {of!r}" + (f"; did you mean {close!r}?" if close else ""))
        config: PreTrainedConfig = transformers.CONFIG_MAPPING[of]()
    else:
        config = of
    if config.get_text_config() is not config:
        return _tiny_with_vision(config, changes)
    values = config.to_dict()
    names = {config.attribute_map.get(name, name): value for name, value in SIZES.items()}
    tiny = {
        name: value
        for name, value in names.items()
        if values.get(name) is not None or (name in values and name in UNSET)
    }
    of_types, depth = (config.attribute_map.get(name, name) for name in ("layer_types", "num_hidden_layers"))
    if values.get(of_types):
        tiny[of_types] = LAYERS.get(config.model_type) or _layer_types(values[of_types])
        tiny |= {depth: len(tiny[of_types])} if depth in values else {}
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        # The sections of the rotary embedding make up half of a head.
        eighth = SIZES["head_dim"] // 8
        rope = values.get("rope_parameters") or {}
        tiny["rope_parameters"] = {**rope, "mrope_section": [2 * eighth, eighth, eighth]}
    if values.get("kv_lora_rank"):
        # Latent attention has a key and a value for each query head.
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]
    changed = {config.attribute_map.get(name, name): value for name, value in changes.items()}
    return _like(config, {**tiny, **SPECIAL, **changed}, "tiny")


def _like(config: PreTrainedConfig, changes: Mapping[str, Any], what: str) -> PreTrainedConfig:
    """Make a configuration with some entries of another changed; ``what`` it is stands in the error's message."""
    values = {name: value for name, value in config.to_dict().items() if name not in UNTYPED}
    try:
        return type(config)(**{**values, **changes})
    except Exception as error:
        # Configuration classes validate in their own ways and may raise anything.
        raise ModelError(f"no {what} {config.model_type!r}: {type(error).__name__}: {error}") from error


def _tiny_with_vision(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """Make a tiny configuration of a vision-language model; changes are of its language model."""
    text = config.get_text_config()
    own = {name: value for name, value in changes.items() if name == "tie_word_embeddings"}
    sizes = {**VISION, "out_hidden_size": SIZES["hidden_size"]}
    parts: dict[str, Any] = {}
    for key in type(config).sub_configs:
        part = getattr(config, key)
        if part is text:
            parts[key] = tiny_config(part, **changes)
            continue
        values = part.to_dict()
        small = {name: size for name, size in sizes.items() if values.get(name) is not None}
        parts[key] = config_of(type(part), {**values, **small})
    return _like(config, {**parts, **own}, "tiny")


def _layer_types(types: list[str]) -> list[str]:
    """Return one layer of each type, and at least two layers."""
    distinct = list(dict.fromkeys(types))
    return distinct if len(distinct) > 1 else distinct * 2


def doubled(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a tiny configuration with its layers twice, so that each type of layer is there more than once.

    Raises:
        ModelError: the configuration's class does not accept it.
    """
    if (text := config.get_text_config()) is not config:
        deeper = copy.deepcopy(config)
        setattr(deeper, next(key for key in type(config).sub_configs if getattr(config, key) is text), doubled(text))
        return deeper
    values = config.to_dict()
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    count: int = getattr(config, name)
    changes: dict[str, Any] = {name: 2 * count} if name in values else {}
    # A pattern, how often it occurs.
    changes |= {key: [[kinds, 2 * count] for kinds, count in values[key]] for key in PATTERNS if values.get(key)}
    for key, value in values.items():
        # Not a pair of limits.
        of_layers = isinstance(value, list) and len(value) == count and not any(isinstance(x, float) for x in value)
        if key not in PATTERNS and of_layers:
            changes[key] = value * 2
    return _like(config, changes, "deeper")


def tiny_model(
    config: PreTrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0, attention: str | None = None
) -> PreTrainedModel:
    """Build a random model in which every parameter affects the logits: biases are not zero, norms are not one.

    Args:
        config: a small configuration.
        dtype: data type of the weights.
        seed: seed of the weights.
        attention: the attention implementation; transformers' default if None.

    Raises:
        ModelError: transformers has no language model for the configuration, or cannot build it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model: Any = from_config(copy.deepcopy(config), attn_implementation=attention)
        except Exception as error:
            # The classes of models may raise anything on options that they do not expect.
            raise ModelError(
                f"transformers cannot build a model of type {config.model_type!r}: {type(error).__name__}: {error}"
            ) from error
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name.endswith("sinks"):
                nn.init.normal_(parameter, std=0.5)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
            else:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    tiny: PreTrainedModel = model.to(dtype=dtype).eval()
    return tiny
