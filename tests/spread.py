"""Models that accelerate spreads over two devices: here the CPU by two names, so that its hooks move every input."""

from __future__ import annotations

import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel

DEVICES = ("cpu:0", torch.device("cpu", 0))
"""Two names that accelerate takes for two devices; it would offload what lies on ``cpu``."""


def spread_(model: PreTrainedModel) -> PreTrainedModel:
    """Put the embeddings and every other layer on one device, the rest on the other."""
    where = {"model.embed_tokens": DEVICES[0], "model.norm": DEVICES[1], "model.rotary_emb": DEVICES[0]}
    where |= {f"model.layers.{index}": DEVICES[index % 2] for index in range(len(model.model.layers))}
    return dispatch_model(model, {**where, "lm_head": DEVICES[1]})
