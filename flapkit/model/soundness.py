"""Refuse models that flapkit cannot prune, before any work: wrapped, adapted, quantised, or not finite."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from flapkit.model.precision import name_of
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

STORED_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""The data types that can be pruned, by their safetensors names."""

FLOATS = tuple(STORED_FLOATS.values())

ADVICE = "use the model in float32, float16 or bfloat16, and quantise it after pruning"


WRAPPERS = {
    "DistributedDataParallel": ("for several devices", "module"),
    "DataParallel": ("for several devices", "module"),
    "FullyShardedDataParallel": ("sharded over several devices", "module"),
    "OptimizedModule": ("by torch.compile", "_orig_mod"),
}
"""Class of a module around another -> what it does, and the attribute that holds the other."""


def check_plain(model: object) -> None:
    """Raise ``ModelError`` unless an object is a transformers model, not wrapped, with plain parameters as its weights.

    The message names the call that undoes what stands in the way.

    Args:
        model: what is to be pruned.
    """
    from transformers import PreTrainedModel

    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            _check_module(name, module)
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"expected a transformers model, found a {type(model).__name__}{_instead_of(model)}")


def check_in_memory(model: PreTrainedModel) -> None:
    """Raise ``ModelError`` if a model's weights are elsewhere: offloaded, or sharded over processes.

    Args:
        model: the model.
    """
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"{name} is not in the device's memory (its device_map offloads it); load the model whole, or prune it "
                "with a recipe and `execution: layerwise`, which has one layer in memory at a time"
            )
        if isinstance(parameter.data, DTensor):
            raise ModelError(
                f"{name} is sharded over several processes; prune the model before it is sharded, or with a recipe and "
                "`execution: layerwise`"
            )


def _instead_of(model: object) -> str:
    """Say what to give instead of something that is no transformers model."""
    from transformers import PreTrainedModel

    if isinstance(model, (str, Path)):
        return "; load it with flapkit.load first"
    children = model.named_children() if isinstance(model, nn.Module) else ()
    name = next((name for name, child in children if isinstance(child, PreTrainedModel)), None)
    return f"; give the model that it holds: `model.{name}`" if name else ""


def _check_module(name: str, module: nn.Module) -> None:
    """Refuse what stands between a module and its weights.

    Args:
        name: the module's full name; empty for the model itself.
        module: the module.
    """
    where, call = (name, f'model.get_submodule("{name}")') if name else ("the model", "model")
    kind = type(module).__name__
    if kind in WRAPPERS:
        what, inner = WRAPPERS[kind]
        raise ModelError(f"{where} is wrapped {what} ({kind}); prune the model inside: `{call}.{inner}`")
    # Without an import of peft, nothing of it can be in the model.
    if "peft" in sys.modules and _is_adapted(module):
        raise ModelError(
            f"{where} has an adapter of peft that is not merged; merge it: `model = peft_model.merge_and_unload()`, or "
            "drop it: `model = peft_model.unload()`"
        )
    for hook in module._forward_pre_hooks.values():
        for of, how, undo in COMPUTED:
            if isinstance(hook, of):
                weight = getattr(hook, "_tensor_name", None) or getattr(hook, "name", "weight")
                raise ModelError(f'{where}: its {weight} is {how}; make it a plain one: `{undo}({call}, "{weight}")`')
    if parametrize.is_parametrized(module):
        weight = next(iter(cast("nn.ModuleDict", module.parametrizations)))
        raise ModelError(
            f"{where}: its {weight} is computed by a parametrization of torch; make it a plain one: "
            f'`torch.nn.utils.parametrize.remove_parametrizations({call}, "{weight}")`'
        )


COMPUTED: tuple[tuple[type, str, str], ...] = (
    (prune.BasePruningMethod, "masked by torch.nn.utils.prune", "torch.nn.utils.prune.remove"),
    (WeightNorm, "computed by torch.nn.utils.weight_norm", "torch.nn.utils.remove_weight_norm"),
    (SpectralNorm, "computed by torch.nn.utils.spectral_norm", "torch.nn.utils.remove_spectral_norm"),
)
"""Class of a hook that computes a weight -> what it does, and the function that makes the weight a plain parameter."""


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


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
        of = name_of(data.dtype) if data.dtype not in FLOATS else type(data).__name__
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
        dtype = (stored or {}).get(param, "F32")
        if dtype not in STORED_FLOATS:
            raise ModelError(f"model {name}: {param} is quantised (stored as {dtype}); {ADVICE}")
        check_float_weight(f"model {name}: {param}", weight)
        check_finite(f"model {name}: {param}", weight)


def check_finite(name: str, tensor: Tensor, advice: str = "download or convert the model again") -> None:
    """Raise ``ModelError`` if a tensor has values that are not finite.

    Args:
        name: the tensor's name.
        tensor: skipped if it is on the meta device, or not of a floating-point type.
        advice: what to do.
    """
    if tensor.is_meta or not tensor.numel() or tensor.dtype not in FLOATS:
        return
    # One pass without a copy: aminmax propagates NaN as well as infinity.
    if not torch.isfinite(torch.stack(tensor.detach().aminmax())).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise ModelError(f"{name}: {count:,} of {tensor.numel():,} values are NaN or infinite; {advice}")
