"""Refuse models that flapkit cannot prune, before any work: quantised weights, and weights that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The data types that can be pruned."""

STORED_FLOATS = ("F32", "F16", "BF16", "F64")
"""The same types by their safetensors names."""

ADVICE = "use the model in float32, float16 or bfloat16, and quantise it after pruning"


def check_unquantised(name: Path | str, config: PreTrainedConfig) -> None:
    """Raise ``ModelError`` if a configuration has quantisation settings.

    Args:
        name: the model's name.
        config: its configuration.
    """
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if settings := getattr(part, key, None):
                raise ModelError(f"model {name}: its weights are quantised ({_method(settings)}); {ADVICE}")


def _method(settings: Any) -> str:
    metadata = settings if isinstance(settings, Mapping) else vars(settings) if hasattr(settings, "__dict__") else {}
    method = metadata.get("quant_method") or metadata.get("quant_type") or "according to its config.json"
    bits = metadata.get("bits") or next((bits for bits in (4, 8) if metadata.get(f"load_in_{bits}bit")), None)
    return f"{getattr(method, 'value', method)}, {bits} bits" if bits else str(getattr(method, "value", method))


def check_float_weight(name: str, tensor: Tensor) -> None:
    """Raise ``ModelError`` unless a weight is an ordinary tensor of floating-point numbers.

    Args:
        name: the weight's full name.
        tensor: the weight.
    """
    from torch.distributed.tensor import DTensor

    data = tensor.data
    if data.dtype not in FLOATS or type(data) not in (Tensor, DTensor):
        of = str(data.dtype).removeprefix("torch.") if data.dtype not in FLOATS else type(data).__name__
        raise ModelError(f"{name} is quantised ({of}); {ADVICE}")


def check_weights(
    name: Path | str, weights: Iterable[tuple[str, Tensor]], stored: Mapping[str, str] | None = None
) -> None:
    """Raise ``ModelError`` if a weight is quantised or has values that are not finite.

    All weights are checked, even those that pruning does not use: a value that is not finite is a sign of damage.

    Args:
        name: the model's name.
        weights: name and tensor of each weight; tensors on the meta device are skipped.
        stored: name of a weight -> the safetensors data type in the file it was converted from.
    """
    for param, weight in weights:
        dtype = (stored or {}).get(param, STORED_FLOATS[0])
        if dtype not in STORED_FLOATS:
            raise ModelError(f"model {name}: {param} is quantised (stored as {dtype}); {ADVICE}")
        check_float_weight(f"model {name}: {param}", weight)
        check_finite(f"model {name}: {param}", weight)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ``ModelError`` if a tensor has values that are not finite.

    Args:
        name: the tensor's name.
        tensor: skipped if it is on the meta device, or not of a floating-point type.
    """
    if tensor.is_meta or not tensor.numel() or tensor.dtype not in FLOATS:
        return
    # One pass without a copy: aminmax propagates NaN as well as infinity.
    if not torch.isfinite(torch.stack(tensor.detach().aminmax())).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"{name}: {count:,} of {tensor.numel():,} values are NaN or infinite; download or convert the model again"
        )
