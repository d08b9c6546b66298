"""LLaMA: multi-head and grouped-query attention, gated MLP, with and without biases."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from flapkit.interfaces import ArchitectureAdapter
from flapkit.sites import Coupling, Site


@dataclass(frozen=True)
class Llama(ArchitectureAdapter):
    """LLaMA 1 to 3 and everything of model type ``llama``.

    A unit of attention is one key/value head with its query heads; nothing but shapes has to follow the cut, since
    transformers 5 infers the number of heads from them.
    """

    name = "llama"

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Tell whether the configuration is a LLaMA's, dense or pruned already."""
        return config.model_type in ("llama", "flapkit_llama")

    def sites(self, config: PreTrainedConfig) -> tuple[Site, ...]:
        """List the attention and the MLP of every layer."""
        return tuple(
            site
            for index, layer in enumerate(config.per_layer_config)
            for site in (_attention(layer, index), _mlp(layer, index))
        )


def _attention(config: PreTrainedConfig, layer: int) -> Site:
    prefix = f"model.layers.{layer}.self_attn"
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query = heads // kv_heads * width
    rows = {"q_proj": query, "k_proj": width, "v_proj": width}
    return Site(
        name=f"layers.{layer}.attention",
        layer=layer,
        kind="attention",
        consumer=f"{prefix}.o_proj",
        units=kv_heads,
        channels_per_unit=query,
        out_features=config.hidden_size,
        couplings=_rows(prefix, rows, config.hidden_size, bias=config.attention_bias),
    )


def _mlp(config: PreTrainedConfig, layer: int) -> Site:
    prefix = f"model.layers.{layer}.mlp"
    return Site(
        name=f"layers.{layer}.mlp",
        layer=layer,
        kind="mlp",
        consumer=f"{prefix}.down_proj",
        units=config.intermediate_size,
        channels_per_unit=1,
        out_features=config.hidden_size,
        couplings=_rows(prefix, {"gate_proj": 1, "up_proj": 1}, config.hidden_size, bias=config.mlp_bias),
    )


def _rows(prefix: str, per_unit: dict[str, int], in_features: int, *, bias: bool) -> tuple[Coupling, ...]:
    weights = [Coupling(f"{prefix}.{name}.weight", 0, rows, in_features) for name, rows in per_unit.items()]
    biases = [Coupling(f"{prefix}.{name}.bias", 0, rows) for name, rows in per_unit.items() if bias]
    return (*weights, *biases)
