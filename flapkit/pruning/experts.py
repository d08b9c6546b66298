"""Observe the experts of a mixture: their consumers are slices of one tensor, whose inputs a hook cannot see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flapkit.system.errors import ModelError

See = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with an expert's index, its consumer's input and output [routed, features], and the routed tokens' indices."""

SeeMixture = Callable[[Tensor], None]
"""Called with the contributions of all experts [tokens, experts]: router weight times norm of the output, else 0."""

NEEDED = ("has_gate", "has_bias", "is_transposed")


def watch(experts: Any, see: See, see_mixture: SeeMixture | None = None) -> None:
    """Compute a module's experts one at a time and call ``see`` for each, until ``unwatch``.

    Args:
        experts: a module made by transformers' ``use_experts_implementation``, whose attributes give the layout of its
            tensors.
        see: called with the input and output of each expert's consumer.
        see_mixture: called once for all experts, after them.

    Raises:
        ModelError: the module lacks an attribute for its layout.
    """
    if missing := [name for name in NEEDED if not hasattr(experts, name)]:
        raise ModelError(
            f"the experts of {type(experts).__name__} cannot be pruned: missing attributes {', '.join(missing)}"
        )

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if see_mixture is None:
            return _forward(experts, hidden_states, top_k_index, top_k_weights, see)
        norms = hidden_states.new_zeros((len(hidden_states), len(experts.down_proj)), dtype=torch.float32)

        def see_both(expert: int, x: Tensor, y: Tensor, token: Tensor) -> None:
            norms[token, expert] = _norms(experts, expert, y)
            see(expert, x, y, token)

        output = _forward(experts, hidden_states, top_k_index, top_k_weights, see_both)
        weights = torch.zeros_like(norms).scatter_add_(1, top_k_index, top_k_weights.detach().float())
        see_mixture(norms * weights)
        return output

    experts.forward = forward


def _norms(experts: Any, expert: int, y: Tensor) -> Tensor:
    """Return the norms of an expert's outputs [routed], float32; all that is added to its consumer's output counts."""
    if not experts.has_bias and getattr(experts, "down_proj_bias", None) is not None:
        y = y + experts.down_proj_bias[expert]
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    norms: Tensor = torch.linalg.vector_norm(y.detach().float(), dim=-1)
    return norms


def unwatch(experts: nn.Module) -> None:
    """Restore a module's own forward."""
    vars(experts).pop("forward", None)


def _forward(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor, see: See) -> Tensor:
    """Do what transformers' ``batched_mm_experts_forward`` does, one expert at a time."""
    output = torch.zeros_like(hidden)
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    for expert in range(len(experts.down_proj)):
        token, slot = torch.where(index == expert)
        if not len(token):
            continue
        x = _linear(experts, first, expert, hidden[token])
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        y = _linear(experts, "down_proj", expert, x)
        see(expert, x, y, token)
        if getattr(experts, "has_post_expert_norm", False):
            y = experts.post_expert_norm(y)
        output = output.index_add(0, token, (y * weights[token, slot, None]).to(output.dtype))
    return output


def _linear(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return functional.linear(x, weight.T if experts.is_transposed else weight, bias)
