"""Gradient death: what goes with a unit is what no gradient reaches once nothing reads the unit.

Where the columns of a consumer that read a unit are zero, the gradients of exactly those rows die that feed nothing
else. That needs no names, only that the activations are alive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flapkit.model.declaration import Block, Family
from flapkit.model.layout import sites_of
from flapkit.model.resize import count
from flapkit.model.site import Site
from flapkit.system.errors import ModelError

LAYOUTS = {
    "attention": ("q", "k", "q+k+k", "(q+k+k)", "k+k", "(k+k)", "q+k", "q+q", "(q+q)"),
    "mlp": ("i", "i+i", "(i+i)"),
}
"""Kind of a block -> the layouts that are tried, the likeliest first."""

Rows = Mapping[str, frozenset[int]]
"""Name of a parameter, or of the module whose weight it is -> some of its rows."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer of a tiny model, of which every gradient can be asked.

    Args:
        model: the tiny model.
        path: full name of the list of layers.
        index: which layer it is.
        has_heads: the configuration counts heads.
    """

    model: PreTrainedModel
    path: str
    index: int
    has_heads: bool

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self.model.get_submodule(f"{self.path}.{self.index}")

    @cached_property
    def always(self) -> Rows:
        """The rows that no gradient ever reaches."""
        return self._dead()

    def consumers(self) -> Iterator[str]:
        """List the linears that write what the layer reads: the next layer, or a norm before it."""
        hidden = self.model.get_input_embeddings().get_parameter("weight").shape[1]
        for name, module in self.module.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and module.weight.shape[_row_dim(module)] == hidden:
                yield name

    def rows_that_die(self, consumer: str, channels: Sequence[int]) -> dict[str, frozenset[int]]:
        """List the rows that feed nothing but some input channels of a consumer.

        Args:
            consumer: the linear, from the layer.
            channels: its input channels that are zeroed.
        """
        linear = self.module.get_submodule(consumer)
        dim = 1 - _row_dim(linear)
        weight: Tensor = linear.get_parameter("weight")
        before = weight.detach().clone()
        with torch.no_grad():
            weight.index_fill_(dim, torch.tensor(channels), 0)
        try:
            dead = self._dead()
        finally:
            with torch.no_grad():
                weight.copy_(before)
        found = {name: rows - self.always[name] for name, rows in dead.items() if name != consumer}
        return {name: rows for name, rows in found.items() if rows}

    def block(self, consumer: str) -> Block | None:
        """Derive the block of a consumer: its kind, and the layout of all that goes with its units.

        Args:
            consumer: the linear, from the layer.

        Returns:
            The block, all names from the layer; None where nothing dies with the units, or in no known layout.
        """
        linear = self.module.get_submodule(consumer)
        channels = linear.get_parameter("weight").shape[1 - _row_dim(linear)]
        one = self.rows_that_die(consumer, [0])
        for bare in self._attentions(consumer):
            site = self._site(bare)
            if site is None:
                continue
            first = self.rows_that_die(consumer, site.channels_of([0]))
            if not all(len(rows) == site.channels_per_unit * len(one.get(name, ())) for name, rows in first.items()):
                last = self.rows_that_die(consumer, site.channels_of([site.units - 1]))
                if block := self._laid_out(bare, {0: first, site.units - 1: last}):
                    return block
        last = self.rows_that_die(consumer, [channels - 1])
        return self._laid_out(Block("mlp", "", consumer, {}), {0: one, channels - 1: last})

    def _attentions(self, consumer: str) -> Iterator[Block]:
        """List what an attention could be: key/value heads as the configuration counts them, or one for all."""
        if self.has_heads:
            yield Block("attention", "", consumer, {})
            yield Block("attention", "", consumer, {}, kv_heads=1)

    def _laid_out(self, bare: Block, dead: Mapping[int, Rows]) -> Block | None:
        """Find the layouts of all that died with a block's units; None where one has none, or nothing died."""
        names = {name for rows in dead.values() for name in rows}
        layouts = {name: self._layout(bare, name, dead) for name, _, _ in _named_rows(self.module) if name in names}
        found = {name: layout for name, layout in layouts.items() if layout}
        return replace(bare, parameters=found) if found and found == layouts else None

    def _layout(self, bare: Block, name: str, dead: Mapping[int, Rows]) -> str | None:
        """Find the layout by which the rows that died are those of their units.

        Args:
            bare: the block that the rows may belong to.
            name: what the rows belong to.
            dead: unit -> what died with it.
        """
        fitting = []
        for layout in LAYOUTS[bare.kind]:
            site = self._site(replace(bare, parameters={name: layout}))
            if site is None:
                continue
            whole = [f"{site.path}.{name}", f"{site.path}.{name}.weight"]
            couplings = [each for each in site.couplings if each.param in whole]
            expected = {
                unit: {row for each in couplings for row in each.indices_of([unit])} - self.always[name]
                for unit in dead
            }
            if all(expected[unit] == rows.get(name, frozenset()) for unit, rows in dead.items()):
                parameter = self.model.get_parameter(couplings[0].param)
                sizes = {"H": site.heads, "K": site.kv_heads, "I": site.units}
                head = parameter.shape[couplings[0].dim] // count(layout, sizes)
                fitting.append((head != site.sizes(site.units).get("D", head), layout))
        # Rows of key/value heads look like thinner rows of query heads: heads as wide as the consumer's come first.
        return min(fitting, key=lambda each: each[0])[1] if fitting else None

    def _site(self, block: Block) -> Site | None:
        try:
            sites = sites_of(self.model, Family("auto", (self.model.config.model_type,), self.path, (block,)))
        except ModelError:
            return None
        return next(site for site in sites if site.layer == self.index)

    def _dead(self) -> dict[str, frozenset[int]]:
        """Run the model forth and back, and list the rows whose gradient is exactly zero."""
        tokens = torch.randint(2, self.model.config.vocab_size, (3, 17), generator=torch.Generator().manual_seed(0))
        self.model.zero_grad()
        logits = self.model(input_ids=tokens, use_cache=False).logits
        logits.mul(torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        found = {}
        for name, parameter, dim in _named_rows(self.module):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            alive = gradient.movedim(dim, 0).flatten(1).ne(0).any(1) if gradient.dim() > 1 else gradient.ne(0)
            found[name] = frozenset(torch.nonzero(~alive).flatten().tolist())
        return found


def _row_dim(module: nn.Module) -> int:
    return int(isinstance(module, Conv1D))


def _named_rows(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter, int]]:
    """List what a declaration could name: weights by their module, other parameters by themselves; no biases.

    A bias goes along with its weight, and that of a key has no gradient at all.
    """
    for name, parameter in layer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = layer.get_submodule(owner)
        if not leaf.endswith("bias") and not hasattr(module, "is_transposed"):
            yield owner if leaf == "weight" and owner else name, parameter, _row_dim(module)
