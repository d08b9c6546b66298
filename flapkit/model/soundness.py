"""Models that flapkit cannot prune, found before any work: quantised ones, and weights that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig

from flapkit.system.errors import ModelError

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The types that weights can be pruned in."""

FILED = ("F32", "F16", "BF16", "F64")
"""The same in the words of safetensors."""

ADVICE = "give the model in float32, float16 or bfloat16, and quantise what was pruned"


def check_unquantised(name: Path | str, config: PreTrainedConfig) -> None:
    """Raise ``ModelError`` if a configuration says that its model's weights are quantised.

    Args:
        name: what the model is called.
        config: its configuration.
    """
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if found := getattr(part, key, None):
                raise ModelError(f"model {name}: its weights are quantised ({_method(found)}); {ADVICE}")


def _method(found: Any) -> str:
    metadata = found if isinstance(found, Mapping) else vars(found) if hasattr(found, "__dict__") else {}
    method = metadata.get("quant_method") or metadata.get("quant_type") or "by its config.json"
    bits = metadata.get("bits") or next((bits for bits in (4, 8) if metadata.get(f"load_in_{bits}bit")), None)
    return f"{getattr(method, 'value', method)}, {bits} bits" if bits else str(getattr(method, "value", method))


def check_plain(name: str, tensor: Tensor) -> None:
    """Raise ``ModelError`` unless a weight is a plain tensor of floating-point numbers.

    Args:
        name: the weight's full name.
        tensor: the weight.
    """
    data = tensor.data
    if data.dtype not in FLOATS or type(data) not in (Tensor, DTensor):
        of = str(data.dtype).removeprefix("torch.") if data.dtype not in FLOATS else type(data).__name__
        raise ModelError(f"{name}: is a quantised weight ({of}); {ADVICE}")


def check_weights(
    name: Path | str, weights: Iterable[tuple[str, Tensor]], stored: Mapping[str, str] | None = None
) -> None:
    """Raise ``ModelError``, which names the weight, if one is quantised or holds a number that is not finite.

    Every weight counts, used or not: one that is not finite was damaged, and the next may be used.

    Args:
        name: what the model is called.
        weights: by their names; those on the meta device are not looked at.
        stored: name of a weight -> safetensors' word for the type that its file holds, from which it was converted.
    """
    for each, weight in weights:
        of = (stored or {}).get(each, FILED[0])
        if of not in FILED:
            raise ModelError(f"model {name}: {each} is stored as {of}, which is a quantised weight's type; {ADVICE}")
        check_plain(f"model {name}: {each}", weight)
        check_finite(f"model {name}: {each}", weight)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ``ModelError`` if a tensor holds a number that is not finite.

    Args:
        name: what it is called.
        tensor: not looked at on the meta device, or where it holds integers.
    """
    if tensor.is_meta or not tensor.numel() or tensor.dtype not in FLOATS:
        return
    # One pass without a copy; what is no number comes through, and so does what is infinite.
    if not torch.isfinite(torch.stack(tensor.detach().aminmax())).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"{name} holds {count:,} numbers of {tensor.numel():,} that are not finite (NaN or infinite); fetch or "
            "convert it again"
        )
