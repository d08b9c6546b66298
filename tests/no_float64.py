"""A device without float64, for machines that have none: Apple's GPUs, whose tensors cannot be float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("mps")


class OnDevice(Tensor):
    """A tensor that says that it lies on the device, and is computed on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        if inner.dtype == torch.float64:
            raise TypeError("the device has no float64")
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE, requires_grad=False
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        unwrapped = function(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs or {}))
        return args[0] if function._schema.is_mutable else _wrapped(unwrapped)


class OnThisDevice(TorchFunctionMode):
    """Runs what is asked of tensors on the device on the CPU, before torch looks for a kernel of the device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return function(*args, **kwargs)
        if name == "__deepcopy__" and isinstance(args[0], OnDevice):
            return nn.Parameter(OnDevice(args[0].inner.clone()), requires_grad=False)
        asked = [part for part in (*args, *kwargs.values()) if isinstance(part, torch.device) or _is_name(part)]
        leaves = tree_flatten((args, kwargs))[0]
        on_device = _is_device(asked[0]) if asked else name != "cpu" and any(isinstance(x, OnDevice) for x in leaves)
        result = function(
            *tree_map(_unwrap, tree_map(_cpu, args)),
            **{key: tree_map(_unwrap, _cpu(part)) for key, part in kwargs.items()},
        )
        in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__iadd__", "__isub__", "__imul__")
        if in_place or "out" in kwargs:
            return kwargs.get("out", args[0])
        return _wrapped(result) if on_device else result


def _wrapped(result: Any) -> Any:
    return tree_map(lambda part: OnDevice(part) if type(part) in (Tensor, nn.Parameter) else part, result)


def _is_name(part: Any) -> bool:
    return isinstance(part, str) and part in ("mps", "cpu")


def _is_device(part: Any) -> bool:
    return isinstance(part, (str, torch.device)) and torch.device(part).type == DEVICE.type


def _cpu(part: Any) -> Any:
    return torch.device("cpu") if isinstance(part, torch.device) or _is_name(part) else part


def _unwrap(part: Any) -> Any:
    return part.inner if isinstance(part, OnDevice) else part


def place_(model: nn.Module) -> None:
    """Move a model to the device."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnDevice(parameter.detach()), requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
