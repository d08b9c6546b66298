"""Tiny classifiers of each kind that some families have."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers
from transformers import PreTrainedModel

from flapkit.model.classes import pruned_classes
from flapkit.model.empty import CAUSAL_LM
from flapkit.model.tiny import tiny_config

FAMILIES = ("llama", "gpt2", "falcon", "mixtral")


def classifiers() -> Iterator[tuple[str, PreTrainedModel]]:
    """Build all of them, each with its Auto class."""
    for family in FAMILIES:
        for auto in pruned_classes(family).heads:
            if auto != CAUSAL_LM:
                yield auto, classifier(family, auto)


def classifier(family: str, auto: str) -> PreTrainedModel:
    """Build a tiny classifier with three labels."""
    torch.manual_seed(0)
    config = tiny_config(family)
    config.num_labels, config.pad_token_id = 3, 0
    model = getattr(transformers, auto).from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model
