"""Falcon, in its three layouts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flapkit.interfaces import Block, Family, FamilyAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MLP = Block("mlp", "mlp", "dense_4h_to_h", {"dense_h_to_4h": "i"}, width="ffn_hidden_size")
ATTENTION = Block(
    "attention",
    "self_attention",
    "dense",
    {"query_key_value": "(q+k+k)"},
    attributes={"num_heads": "H", "num_kv_heads": "K"},
    kv_heads="num_kv_heads",
)
"""Falcon 40B and 180B: several key/value heads, each with its query heads."""

ONE_KV_HEAD = replace(ATTENTION, parameters={"query_key_value": "q+k+k"}, kv_heads=1)
"""Falcon 7B: one key/value head, so that single query heads can be removed."""

ALL_HEADS = replace(ATTENTION, kv_heads="num_attention_heads")
"""Falcon RW: as many key/value heads as query heads."""


@dataclass(frozen=True)
class Falcon(FamilyAdapter):
    """Falcon: 40B and 180B, 7B with one key/value head, and RW with ALiBi."""

    name = "falcon"
    family = Family("falcon", ("falcon",), "transformer.h", (ATTENTION, MLP))

    def family_of(self, config: PreTrainedConfig) -> Family:
        """Choose the layout by the configuration's flags."""
        attention = ATTENTION if config.new_decoder_architecture else ONE_KV_HEAD if config.multi_query else ALL_HEADS
        if config.alibi:
            attention = replace(attention, arguments={"alibi": 1, "attention_mask": 1})
        return replace(self.family, blocks=(attention, MLP))
