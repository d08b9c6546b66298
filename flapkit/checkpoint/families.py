"""The transformers classes that pruned models are saved as, one set for each family.

transformers' own classes cannot be built from a configuration whose layers differ, so each family has a small
subclass, in a file that its checkpoints carry. ``register`` makes the Auto classes know them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flapkit.checkpoint import modeling_flapkit_llama
from flapkit.checkpoint.modeling_flapkit_llama import (
    FlapkitLlamaConfig,
    FlapkitLlamaForCausalLM,
    FlapkitLlamaModel,
)
from flapkit.sites import Site
from flapkit.surgery import consumer_of


@dataclass(frozen=True, slots=True)
class Family:
    """How pruned models of one family are saved.

    Args:
        dense: model type of the dense models.
        config: configuration class of the pruned ones.
        backbone: their decoder's class.
        causal_lm: their language model's class.
        code: the file that defines the three classes.
    """

    dense: str
    config: type[PreTrainedConfig]
    backbone: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    code: Path

    @property
    def auto_map(self) -> dict[str, str]:
        """Where ``trust_remote_code=True`` finds each Auto class's model in a checkpoint."""
        classes = {"AutoConfig": self.config, "AutoModel": self.backbone, "AutoModelForCausalLM": self.causal_lm}
        return {auto: f"{self.code.stem}.{found.__name__}" for auto, found in classes.items()}


FAMILIES = (
    Family(
        "llama",
        FlapkitLlamaConfig,
        FlapkitLlamaModel,
        FlapkitLlamaForCausalLM,
        Path(str(modeling_flapkit_llama.__file__)),
    ),
)


def family_of(config: PreTrainedConfig) -> Family | None:
    """Find the family of a dense or a pruned model, if flapkit can save it."""
    return next((family for family in FAMILIES if config.model_type in (family.dense, family.config.model_type)), None)


def register() -> None:
    """Make transformers' Auto classes load pruned checkpoints; more than once does no harm."""
    for family in FAMILIES:
        AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
        AutoModel.register(family.config, family.backbone, exist_ok=True)
        AutoModelForCausalLM.register(family.config, family.causal_lm, exist_ok=True)


def describe_(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Give a sliced model the configuration that says what it has become, in place.

    From then on ``save_pretrained`` writes what ``from_pretrained`` can read. A model of a family that flapkit cannot
    save keeps its dense configuration.

    Args:
        model: a model after ``slice_``.
        sites: its sites as they were before.
    """
    family = family_of(model.config)
    if family is None:
        return
    dense = model.config.to_dict()
    layers: dict[int, dict[str, Any]] = {
        int(layer): values for layer, values in dense.pop("per_layer_config", {}).items()
    }
    for site in sites:
        layers.setdefault(site.layer, {}).update(_sizes(model, site))
    dense.pop("model_type")
    config = family.config.from_dict({**dense, "per_layer_config": layers})
    config.name_or_path = model.config.name_or_path
    config._attn_implementation = model.config._attn_implementation
    previous = model.config
    for module in model.modules():
        if getattr(module, "config", None) is previous:
            setattr(module, "config", config)  # noqa: B010 - torch types attributes of modules as modules


def _sizes(model: PreTrainedModel, site: Site) -> dict[str, Any]:
    """Read one site's sizes off its consumer, in the words of transformers' ``per_layer_config``."""
    consumer = consumer_of(model, site)
    has_bias = consumer.bias is not None
    if site.kind == "mlp":
        return {"intermediate_size": consumer.in_features, "mlp_out_bias": has_bias and not model.config.mlp_bias}
    units = consumer.in_features // site.channels_per_unit
    return {
        "num_attention_heads": consumer.in_features // model.config.head_dim,
        "num_key_value_heads": units,
        "attention_out_bias": has_bias and not model.config.attention_bias,
    }
