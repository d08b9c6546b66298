"""The type in which a model's weights are stored, where that is another than the one that it computes in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flapkit.system.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def name_of(dtype: torch.dtype) -> str:
    """Return a type's name as recipes write it, such as ``float32``."""
    return str(dtype).removeprefix("torch.")


def convert(model: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Convert floating-point tensors of a model to the type that they are stored in.

    What transformers keeps in float32 whatever the model's type, such as a router's bias, stays as it is.

    Args:
        model: the model.
        tensors: its tensors by their full names.
        dtype: the type of the checkpoint.

    Yields:
        Each name with its converted tensor.

    Raises:
        RunError: a value is finite, and too large for the type.
    """
    kept = "|".join(re.escape(name).replace(r"\*", ".*") for name in model._get_dtype_plan(dtype))
    pattern = re.compile(rf"(^|\.)({kept})(\.|$)") if kept else None
    for name, tensor in tensors.items():
        yield name, tensor if pattern and pattern.search(name) else _converted(name, tensor, dtype)


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if not converted.isfinite().all() and tensor.isfinite().all():
        raise RunError(
            f"{name}: its largest value, {float(tensor.abs().max()):.3g}, is too large for {name_of(dtype)}, the type "
            "of the checkpoint; set model.save_dtype: float32"
        )
    return converted


@torch.no_grad()
def round_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round a model's weights to the values that a checkpoint of a type can hold; their own type stays.

    A parameter that changes is replaced: a copy of the model that shares its weights stays as it is.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters())
    for name, converted in convert(model, parameters, dtype):
        parameter, rounded = parameters[name], converted.to(parameters[name].dtype)
        if not torch.equal(parameter, rounded):
            replaced = nn.Parameter(rounded, requires_grad=parameter.requires_grad)
            for tied in names[id(parameter)]:
                path, _, leaf = tied.rpartition(".")
                setattr(model.get_submodule(path), leaf, replaced)


@torch.no_grad()
def convert_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert a model's weights in place to the type that they are stored in."""
    for name, converted in convert(model, dict(model.named_parameters()), dtype):
        model.get_parameter(name).data = converted
