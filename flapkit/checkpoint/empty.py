"""Models without memory: what a configuration describes, on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from flapkit.errors import ModelError

MOST_LAYERS = 10_000
"""A configuration of more decoder layers is a mistake, or wants to keep somebody waiting: all of them are built."""


def build_empty(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a configuration's causal language model on the meta device: its shapes without its weights.

    Raises:
        ModelError: transformers can build none of it.
    """
    check_depth(config)
    try:
        with torch.device("meta"), no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            # Without initialisation, tied weights would count twice.
            model.tie_weights()
    except Exception as error:
        said = f"the configuration of type {config.model_type!r} describes no model"
        raise ModelError(f"{said}: {type(error).__name__}: {error}") from error
    return model


def check_depth(config: PreTrainedConfig) -> None:
    """Raise ``ModelError`` unless a configuration has a sensible number of layers."""
    layers: Any = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
        raise ModelError(f"its configuration says num_hidden_layers {layers}, expected 1 to {MOST_LAYERS}")
