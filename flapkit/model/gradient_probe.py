"""Gradient probe: find the parameters that go with a unit without knowing their names.

If the consumer's columns that read a unit are set to zero, the gradient becomes exactly zero in the rows that feed only
this unit. These rows go with the unit. Requirement: the activation functions have a non-zero gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flapkit.model.declaration import Block, Family
from flapkit.model.layout import sites_of
from flapkit.model.resize import count_rows, is_conv1d, is_linear
from flapkit.model.site import Site
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUTS = {
    "attention": ("q", "k", "q+k+k", "(q+k+k)", "k+k", "(k+k)", "q+k", "q+q", "(q+q)"),
    "mlp": ("i", "i+i", "(i+i)"),
}
"""Kind of a block -> layouts to try, the most likely first."""

Rows = Mapping[str, frozenset[int]]
"""Name of a parameter, or of the module that owns the weight -> some of its rows."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer of a tiny model, to be probed.

    Args:
        model: the tiny model.
        path: full name of the list of layers.
        index: index of the layer.
        has_heads: whether the configuration has a number of attention heads.
    """

    model: PreTrainedModel
    path: str
    index: int
    has_heads: bool

    @property
    def module(self) -> nn.Module:
        """The layer's module."""
        return self.model.get_submodule(f"{self.path}.{self.index}")

    @cached_property
    def unused(self) -> Rows:
        """Rows whose gradient is zero in the unchanged model."""
        return self._zero_gradient_rows()

    def consumers(self) -> Iterator[str]:
        """List the linears that write to the residual stream: their output has the hidden size."""
        hidden = self.model.get_input_embeddings().get_parameter("weight").shape[1]
        for name, module in self.module.named_modules():
            if is_linear(module) and module.weight.shape[_row_dim(module)] == hidden:
                yield name

    def rows_feeding(self, consumer: str, channels: Sequence[int]) -> dict[str, frozenset[int]]:
        """Find the rows that feed only the given input channels of a consumer.

        Args:
            consumer: name of the linear, relative to the layer.
            channels: its input channels to set to zero.
        """
        linear = self.module.get_submodule(consumer)
        dim = 1 - _row_dim(linear)
        weight: Tensor = linear.get_parameter("weight")
        before = weight.detach().clone()
        with torch.no_grad():
            weight.index_fill_(dim, torch.tensor(channels), 0)
        try:
            zero = self._zero_gradient_rows()
        finally:
            with torch.no_grad():
                weight.copy_(before)
        feeding = {name: rows - self.unused[name] for name, rows in zero.items() if name != consumer}
        return {name: rows for name, rows in feeding.items() if rows}

    def block(self, consumer: str) -> Block | None:
        """Derive the block of a consumer: its kind, and the layouts of the parameters that go with its units.

        Args:
            consumer: name of the linear, relative to the layer.

        Returns:
            The block, with all names relative to the layer; None if nothing goes with the units, or in no known layout.
        """
        linear = self.module.get_submodule(consumer)
        channels = linear.get_parameter("weight").shape[1 - _row_dim(linear)]
        one = self.rows_feeding(consumer, [0])
        for candidate in self._attention_candidates(consumer):
            site = self._site(candidate)
            if site is None:
                continue
            first = self.rows_feeding(consumer, site.channels_of([0]))
            if not all(len(rows) == site.channels_per_unit * len(one.get(name, ())) for name, rows in first.items()):
                last = self.rows_feeding(consumer, site.channels_of([site.units - 1]))
                if block := self._with_layouts(candidate, {0: first, site.units - 1: last}):
                    return block
        last = self.rows_feeding(consumer, [channels - 1])
        return self._with_layouts(Block("mlp", "", consumer, {}), {0: one, channels - 1: last})

    def _attention_candidates(self, consumer: str) -> Iterator[Block]:
        """List possible attentions: with the configuration's number of key/value heads, or with a single one."""
        if self.has_heads:
            yield Block("attention", "", consumer, {})
            yield Block("attention", "", consumer, {}, kv_heads=1)

    def _with_layouts(self, candidate: Block, unit_rows: Mapping[int, Rows]) -> Block | None:
        """Add the coupled parameters' layouts to a block; None if one fits no layout, or nothing is coupled.

        Args:
            candidate: the block without coupled parameters.
            unit_rows: unit -> the rows that feed only this unit.
        """
        names = {name for rows in unit_rows.values() for name in rows}
        layouts = {
            name: self._layout(candidate, name, unit_rows) for name, _, _ in _named_rows(self.module) if name in names
        }
        known = {name: layout for name, layout in layouts.items() if layout}
        return replace(candidate, parameters=known) if known and known == layouts else None

    def _layout(self, candidate: Block, name: str, unit_rows: Mapping[int, Rows]) -> str | None:
        """Find the layout that assigns a parameter's rows to the units they feed.

        Args:
            candidate: the block that the rows may belong to.
            name: the parameter, or the module that owns it.
            unit_rows: unit -> the rows that feed only this unit.
        """
        fitting = []
        for layout in LAYOUTS[candidate.kind]:
            site = self._site(replace(candidate, parameters={name: layout}))
            if site is None:
                continue
            whole = [f"{site.path}.{name}", f"{site.path}.{name}.weight"]
            couplings = [coupling for coupling in site.couplings if coupling.param in whole]
            expected = {
                unit: {row for coupling in couplings for row in coupling.indices_of([unit])} - self.unused[name]
                for unit in unit_rows
            }
            if all(expected[unit] == rows.get(name, frozenset()) for unit, rows in unit_rows.items()):
                parameter = self.model.get_parameter(couplings[0].param)
                sizes = {"H": site.heads, "K": site.kv_heads, "I": site.units}
                head = parameter.shape[couplings[0].dim] // count_rows(layout, sizes)
                fitting.append((head != site.sizes(site.units).get("D", head), layout))
        # Rows of key/value heads also fit as query heads of fewer channels: prefer the consumer's channels per head.
        return min(fitting, key=lambda candidate: candidate[0])[1] if fitting else None

    def _site(self, block: Block) -> Site | None:
        try:
            sites = sites_of(self.model, Family("auto", (self.model.config.model_type,), self.path, (block,)))
        except ModelError:
            return None
        return next(site for site in sites if site.layer == self.index)

    def _zero_gradient_rows(self) -> dict[str, frozenset[int]]:
        """Run the model forward and backward, and list the rows whose gradient is exactly zero."""
        tokens = torch.randint(2, self.model.config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
        self.model.zero_grad()
        logits = self.model(input_ids=tokens, use_cache=False).logits
        logits.mul(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        zero = {}
        for name, parameter, dim in _named_rows(self.module):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            nonzero = gradient.movedim(dim, 0).flatten(1).ne(0).any(1) if gradient.dim() > 1 else gradient.ne(0)
            zero[name] = frozenset(torch.nonzero(~nonzero).flatten().tolist())
        return zero


def _row_dim(module: nn.Module) -> int:
    return int(is_conv1d(module))


def _named_rows(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter, int]]:
    """List the parameters that a declaration can name, with their row dimension: weights by their module; no biases.

    A bias has its weight's layout, and the bias of a key projection has no gradient at all.
    """
    for name, parameter in layer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = layer.get_submodule(owner)
        if not leaf.endswith("bias") and not hasattr(module, "is_transposed"):
            yield owner if leaf == "weight" and owner else name, parameter, _row_dim(module)
