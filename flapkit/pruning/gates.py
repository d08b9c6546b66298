"""Gates at the consumers of a model, which a searcher trains to find a plan. The core runs the training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.model.surgery import consumer_of
from flapkit.pruning.recovery import divergence, next_token_loss
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "flapkit_gates"
"""The name under which gates are a module of the model while they are trained."""


class Gates(nn.Module, ABC):
    """Gates on the inputs of a model's consumers.

    Its parameters are trained; the model's weights are frozen. Before each forward pass of the model ``update`` is
    called, then the gates with each consumer's input. In training mode gradients flow; otherwise only the plan counts.
    Buffers that the parameters determine must not be persistent.
    """

    @abstractmethod
    def update(self) -> None:
        """Compute the gates of the next forward pass from the parameters; they must meet the budget."""

    @abstractmethod
    def forward(self, site: str, inputs: Tensor) -> Tensor:
        """Gate a consumer's input.

        Args:
            site: name of the site.
            inputs: [windows, tokens, channels].

        Returns:
            The input that the consumer gets instead, of the same shape and dtype.
        """

    @abstractmethod
    def plan(self) -> PruningPlan:
        """Return the plan that follows from the parameters."""

    def loss(self, logits: Tensor, dense: Tensor, tokens: Tensor, attended: Tensor) -> Tensor:
        """Return the loss: by default the cross-entropy, and the divergence from the dense model's predictions.

        Args:
            logits: of the gated model [windows, tokens, vocabulary].
            dense: of the dense model, of the same shape.
            tokens: the windows [windows, tokens].
            attended: which tokens are not padding, bool [windows, tokens].

        Returns:
            Nats per predicted token, a scalar.
        """
        return next_token_loss(logits, tokens, attended) + divergence(logits, dense, attended)


def check_gated(sites: Sequence[Site]) -> None:
    """Refuse sites whose consumer's input is not one tensor.

    Raises:
        ModelError: some sites are stacked experts.
    """
    if stacked := [site.name for site in sites if site.stacked]:
        raise ModelError(
            f"{stacked[0]}: a searcher that trains gates cannot gate experts that are stacked in one parameter; "
            "choose another searcher"
        )


class GatedModel:
    """A model whose consumers' inputs pass through gates; everything but the gates is frozen.

    Args:
        model: the model; hooks are added in place, and ``remove_`` removes them.
        sites: the gated sites.
        gates: the gates, added to the model as a module.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], gates: Gates) -> None:
        self.gates = gates
        self._model = model
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._open = True
        model.requires_grad_(False)
        model.add_module(NAME, gates)
        self._hooks = [model.register_forward_pre_hook(self._update)]
        for site in sites:
            self._hooks.append(consumer_of(model, site).register_forward_pre_hook(partial(self._gate, site.name)))

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Leave the gates out: the dense model, without gradients."""
        self._open = False
        try:
            with torch.no_grad():
                yield
        finally:
            self._open = True

    def remove_(self) -> None:
        """Remove the gates, so that the model is as before."""
        for hook in self._hooks:
            hook.remove()
        if NAME in dict(self._model.named_children()):
            delattr(self._model, NAME)
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def _update(self, *call: Any) -> None:
        if self._open:
            self.gates.update()

    def _gate(self, site: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (self.gates(site, inputs[0]), *inputs[1:]) if self._open else None
