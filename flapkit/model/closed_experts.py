"""Mask whole experts: a router that never chooses them, as if they were removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flapkit.model.resize import replace_, tensor_of


def close_experts_(router: nn.Module, experts: Sequence[int], vectors: Sequence[str]) -> None:
    """Make a router never choose some experts, in place: their logits are minus infinity.

    What remains of the router's arithmetic (a softmax before or after the choice, weights that are normalised again) is
    then what a router without these experts computes.

    Args:
        router: the module that chooses the experts of a token.
        experts: the experts to close.
        vectors: names of its parameters and buffers with one number for each expert [experts], which may enter the
            choice beside the logits.
    """
    index = torch.tensor(list(experts), device=next(router.parameters()).device)
    for name in vectors:
        # Replaced, not written: a copy of the model may share them.
        replace_(router, name, tensor_of(router, name).detach().index_fill(0, index, -math.inf))
    vars(router)["closed_experts"] = index
    router.__class__ = type(f"Closed{type(router).__name__}", (_ClosedExperts, type(router)), {})


class _ClosedExperts:
    """Mixin of a router some of whose experts are closed."""

    closed_experts: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the router's own forward; its one linear computes the logits."""
        with _ClosedLogits(self.closed_experts):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _ClosedLogits(TorchFunctionMode):
    """Set some features of the output of every linear to minus infinity."""

    def __init__(self, experts: Tensor) -> None:
        super().__init__()
        self._experts = experts

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch."""
        output = func(*args, **(kwargs or {}))
        return output.index_fill(-1, self._experts, -math.inf) if func is functional.linear else output
