"""Models that accelerate has spread over several devices (``device_map``): each weight stays where it is."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_spread(model: PreTrainedModel) -> bool:
    """Tell whether accelerate has placed parts of a model on different devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def embeddings_device(model: PreTrainedModel) -> torch.device:
    """Return the device of the embeddings, which is where a model takes in its tokens."""
    device: torch.device = next(model.get_input_embeddings().parameters()).device
    return device


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return the number of tokens that a model has embeddings of."""
    return len(next(model.get_input_embeddings().parameters()))


def check_accelerate(device_map: Any) -> None:
    """Raise ``ModelError`` if a device map is given, and accelerate, which places the weights, is not installed.

    Args:
        device_map: as for ``flapkit.load``; None for none.
    """
    if device_map is not None and find_spec("accelerate") is None:
        raise ModelError("device_map: accelerate places the weights, and is not installed: pip install accelerate")
