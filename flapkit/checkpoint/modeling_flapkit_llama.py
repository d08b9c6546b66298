"""A LLaMA whose layers differ in heads and widths: transformers' own classes, with their linears resized.

This file needs transformers alone. It is part of flapkit, and it lies in every checkpoint that flapkit writes, so that
``from_pretrained(..., trust_remote_code=True)`` loads one where flapkit is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


@strict
class FlapkitLlamaConfig(LlamaConfig):
    """LLaMA's configuration at the dense model's sizes; ``per_layer_config`` holds what differs in a layer.

    A layer can have its own ``num_attention_heads``, ``num_key_value_heads``, ``intermediate_size``,
    ``attention_out_bias`` and ``mlp_out_bias``.

    Args:
        attention_out_bias: ``o_proj`` has a bias, whatever ``attention_bias`` says of the other projections.
        mlp_out_bias: ``down_proj`` has a bias, whatever ``mlp_bias`` says of the other projections.
    """

    model_type = "flapkit_llama"

    attention_out_bias: bool = False
    mlp_out_bias: bool = False

    def validate_architecture(self) -> None:
        """Check every layer's head counts; ``head_dim`` is given, so nothing has to divide the hidden size."""
        for index, layer in enumerate(self.per_layer_config):
            if layer.num_attention_heads % layer.num_key_value_heads:
                raise ValueError(
                    f"layer {index}: {layer.num_attention_heads} attention heads cannot share "
                    f"{layer.num_key_value_heads} key/value heads"
                )


class FlapkitLlamaModel(LlamaModel):
    """The decoder of a pruned LLaMA."""

    config_class = FlapkitLlamaConfig
    config: FlapkitLlamaConfig

    def __init__(self, config: FlapkitLlamaConfig) -> None:
        with _dense_sizes(config):
            super().__init__(config)
        _resize(self, self)


class FlapkitLlamaForCausalLM(LlamaForCausalLM):
    """A pruned LLaMA with its language-modelling head."""

    config_class = FlapkitLlamaConfig
    config: FlapkitLlamaConfig

    def __init__(self, config: FlapkitLlamaConfig) -> None:
        with _dense_sizes(config):
            super().__init__(config)
        _resize(self, self.model)


@contextmanager
def _dense_sizes(config: FlapkitLlamaConfig) -> Iterator[None]:
    """Let transformers build a dense model around this very object, which its modules go on to hold."""
    layers = config.to_dict().get("per_layer_config")
    config.per_layer_config = None
    try:
        yield
    finally:
        config.per_layer_config = layers


def _resize(owner: LlamaModel | LlamaForCausalLM, model: LlamaModel) -> None:
    """Give the linears of every layer the sizes that its configuration says."""
    for layer, config in zip(model.layers, model.config.per_layer_config, strict=True):
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        hidden = config.hidden_size
        query = config.num_attention_heads * config.head_dim
        key_value = config.num_key_value_heads * config.head_dim
        width = config.intermediate_size
        attention_out = config.attention_bias or config.attention_out_bias
        mlp_out = config.mlp_bias or config.mlp_out_bias
        for module, name, in_features, out_features, bias in (
            (attention, "q_proj", hidden, query, config.attention_bias),
            (attention, "k_proj", hidden, key_value, config.attention_bias),
            (attention, "v_proj", hidden, key_value, config.attention_bias),
            (attention, "o_proj", query, hidden, attention_out),
            (mlp, "gate_proj", hidden, width, config.mlp_bias),
            (mlp, "up_proj", hidden, width, config.mlp_bias),
            (mlp, "down_proj", width, hidden, mlp_out),
        ):
            linear = getattr(module, name)
            if (linear.in_features, linear.out_features, linear.bias is not None) != (in_features, out_features, bias):
                linear = nn.Linear(in_features, out_features, bias, linear.weight.device, linear.weight.dtype)
                owner._init_weights(linear)  # type: ignore[no-untyped-call]
                setattr(module, name, linear)
        attention.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        mlp.intermediate_size = width
