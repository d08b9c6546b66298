"""Which weights of a checkpoint are one: what its config.json says, held against its tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flapkit.model.empty import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)


def calls_tied(config: PreTrainedConfig) -> bool:
    """Tell whether a configuration calls the embedding and the head tied."""
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))


def untie_(config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> None:
    """Correct a configuration that calls weights tied of which the checkpoint holds two different ones, in place.

    transformers loads such a checkpoint as it is, with a head of its own; the configuration has to say so for everyone
    who builds the model from it.

    Args:
        config: the checkpoint's configuration.
        weights: its tensors, each read when it is asked for.
    """
    if not calls_tied(config):
        return
    tied: Mapping[str, str] = skeleton(config).all_tied_weights_keys
    for name, source in tied.items():
        if name in weights and source in weights and not torch.equal(weights[name], weights[source]):
            log.info("config.json ties %s and %s, but the checkpoint contains both; they are not tied", name, source)
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
            return
