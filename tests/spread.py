"""A model with accelerate's hooks, as ``device_map`` leaves it on several devices; here both are the CPU."""

from __future__ import annotations

from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import PreTrainedModel


def spread_(model: PreTrainedModel) -> PreTrainedModel:
    """Put the embeddings and every other layer on one device, the rest on the other; hooks move what they take in."""
    where = {"model.embed_tokens": 0, "model.norm": 1, "lm_head": 1}
    where |= {f"model.layers.{index}": index % 2 for index in range(len(model.model.layers))}
    for name in where:
        add_hook_to_module(model.get_submodule(name), AlignDevicesHook("cpu"))
    add_hook_to_module(model, AlignDevicesHook("cpu", io_same_device=True))
    model.hf_device_map = where
    return model
