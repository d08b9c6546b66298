"""Make a model's sites from its declaration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from flapkit.model.declaration import EXPERT_MULTIPLE, Block, Family, Unit
from flapkit.model.resize import (
    SIZES,
    columns_of,
    count_rows,
    find_module,
    heads_of,
    removed_from,
    rows_of,
    tensor_of,
)
from flapkit.model.site import Coupling, Site
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sites_of(model: PreTrainedModel, family: Family, unit: Unit = "kv_group") -> tuple[Site, ...]:
    """Return the sites that a declaration gives for a model, in the model's order.

    Args:
        model: a causal language model; it may be on the meta device.
        family: its declaration.
        unit: the attention unit.

    Raises:
        ModelError: the declaration does not fit the model; the message says where.
    """
    try:
        layers = model.get_submodule(family.layers)
    except AttributeError as error:
        raise ModelError(f"adapter {family.name!r}: {type(model).__name__} has no module {family.layers}") from error
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"adapter {family.name!r}: {family.layers} is a {type(layers).__name__}, not a list of layers")
    sites: list[Site] = []
    used: set[int] = set()
    for index, layer in enumerate(layers):
        for number, block in enumerate(family.blocks):
            module = find_module(layer, block.data)
            if module is not None:
                used.add(number)
                path = ".".join(part for part in (family.layers, str(index), block.path) if part)
                sites += _LayerBlock(model, module, block, path, index).sites(unit)
    for number, block in enumerate(family.blocks):
        if number not in used and not block.optional:
            where = ".".join(part for part in (block.path, block.consumer) if part)
            raise ModelError(f"adapter {family.name!r}: no layer of {family.layers} has {where} (block {block.name})")
    return _nested(sites)


def _nested(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Count the channels of experts once, where these and their mixture are both sites."""
    mixtures = {site.weight: site.name for site in sites if site.kind == "mixture"}
    experts = {site.weight: site.params for site in sites if site.expert == 0}
    nested = []
    for site in sites:
        if site.kind == "mixture":
            nested.append(replace(site, nested=experts.get(site.weight, 0)))
        else:
            nested.append(replace(site, within=mixtures.get(site.weight, "")))
    return tuple(nested)


def removed_blocks(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of the blocks that are gone from a model altogether, such as ``layers.0.attention``."""
    declared = getattr(model.config, "flapkit", None)
    if declared is None:
        return ()
    layers: Any = model.get_submodule(declared["layers"])
    return tuple(
        f"layers.{index}.{block['name']}"
        for index, layer in enumerate(layers)
        for block in declared["blocks"]
        if removed_from(layer, block)
    )


@dataclass(frozen=True)
class _LayerBlock:
    """One block of one layer."""

    model: PreTrainedModel
    module: nn.Module
    block: Block
    path: str
    layer: int

    def sites(self, unit: Unit) -> Iterator[Site]:
        if self.block.kind == "mixture":
            yield self._mixture()
            return
        consumer, dim = columns_of(self.module, self.block.data)
        weight = self.module.get_parameter(consumer)
        counts = self._counts(weight.shape[dim] if weight.numel() else 0)
        units, runs = self._units(counts, unit)
        name = f"layers.{self.layer}.{self.block.name}"
        experts: Sequence[int | None] = range(len(weight)) if self.block.kind == "experts" else [None]
        couplings = tuple(self._couplings(counts, units))
        rest = self._rest(units, couplings)
        for expert in experts:
            yield Site(
                name=name if expert is None else f"{name}.{expert}",
                layer=self.layer,
                kind="attention" if self.block.kind == "attention" else "mlp",
                consumer=f"{self.path}.{self.block.consumer}",
                units=units,
                channels_per_unit=weight.shape[dim] // units,
                out_features=weight.shape[-1] if dim == weight.dim() - 2 else weight.shape[-2],
                couplings=couplings,
                dim=dim,
                expert=expert,
                group="" if expert is None else name,
                multiple=1 if expert is None or units % EXPERT_MULTIPLE else EXPERT_MULTIPLE,
                runs=runs,
                heads=counts.get("H", 0),
                kv_heads=counts.get("K", 0),
                rest=rest,
                removable=self.block.removable and expert is None and (bool(self.block.path) or not counts.get("H")),
                one_of=self._one_of,
                path=self.path,
                block=self.block,
            )

    @property
    def _one_of(self) -> str:
        """What the model needs one of: the first attention of a type has the place of the cache that counts tokens."""
        types = getattr(self.model.config.get_text_config(), "layer_types", None)
        if self.block.kind != "attention" or types is None or len(set(types)) == 1:
            return self.block.name
        return f"{self.block.name} in layers of type {types[self.layer]}"

    def _rest(self, units: int, couplings: Sequence[Coupling]) -> int:
        """Count the parameters that go with the last unit: all that are not of units, and not the consumer's bias."""
        if self.block.kind == "experts" or not self.block.path:
            return 0
        consumer = self.module.get_submodule(self.block.consumer)
        kept = sum(parameter.numel() for parameter in consumer.parameters(recurse=False))
        total = sum(parameter.numel() for parameter in self.module.parameters())
        return total - kept - units * sum(coupling.params_per_unit for coupling in couplings)

    def _mixture(self) -> Site:
        """Return the site whose units are whole experts."""
        weight, name = self.module.get_parameter(self.block.consumer), f"layers.{self.layer}.{self.block.name}"
        config: Any = self.model.config.get_text_config()
        routed, groups, open_groups = (
            getattr(config, entry, None) or 1 for entry in ("num_experts_per_tok", "n_group", "topk_group")
        )
        counts = self._counts(len(weight) if weight.numel() else 0)
        # A router with groups ranks them by the sum of their best two.
        least = max(math.ceil(routed / open_groups), 2 if hasattr(config, "n_group") else 1) * groups
        if counts["E"] % groups or counts["E"] < least:
            raise ModelError(
                f"{name}: {counts['E']} experts in {groups} groups, {routed} of them for each token, do not fit"
            )
        return Site(
            name=name,
            layer=self.layer,
            kind="mixture",
            consumer=f"{self.path}.{self.block.consumer}",
            units=counts["E"],
            channels_per_unit=1,
            out_features=weight.numel() // counts["E"],
            couplings=tuple(self._couplings(counts, counts["E"])),
            dim=0,
            runs=groups,
            least=least,
            path=self.path,
            block=self.block,
        )

    def _tensor(self, parameter: str, name: str) -> Tensor:
        try:
            tensor: Tensor = tensor_of(self.module, parameter)
            return tensor
        except AttributeError as error:
            raise ModelError(f"{self.path}: the module has no {name}, which the adapter declares") from error

    def _counts(self, channels: int) -> dict[str, int]:
        if not channels:
            raise ModelError(f"layers.{self.layer}.{self.block.name}: {self.block.consumer} has no input channels")
        if self.block.kind != "attention":
            return {"E" if self.block.kind == "mixture" else "I": channels}
        try:
            counts = heads_of(self.model.config.get_text_config().per_layer_config[self.layer], self.block.data)
        except AttributeError as error:
            raise ModelError(f"layers.{self.layer}.{self.block.name}: {error}") from error
        if not all(isinstance(heads, int) and heads > 0 for heads in counts.values()):
            raise ModelError(
                f"layers.{self.layer}.{self.block.name}: the configuration has invalid numbers of heads: {counts}"
            )
        if channels % counts["H"] or counts["H"] % counts["K"]:
            raise ModelError(
                f"layers.{self.layer}.{self.block.name}: {channels} channels of {self.block.consumer}, "
                f"{counts['H']} query heads and {counts['K']} key/value heads are not divisible by each other"
            )
        return counts

    def _units(self, counts: dict[str, int], unit: Unit) -> tuple[int, int]:
        """Return the number of units, and the number of equal runs they form."""
        if self.block.kind != "attention":
            return counts["I"], 1
        if counts["K"] == 1 and self.block.takes_query_heads:
            return counts["H"], 1
        if unit == "kv_group" or counts["K"] == counts["H"]:
            return counts["K"], 1
        if not self.block.takes_query_heads:
            raise ModelError(
                f"unit: query_head: models of type {self.model.config.model_type!r} cannot lose single query heads; "
                "use kv_group"
            )
        return counts["H"], counts["K"]

    def _couplings(self, counts: dict[str, int], units: int) -> Iterator[Coupling]:
        for name, layout in self.block.parameters.items():
            for parameter, dim in rows_of(self.module, self.block.data, name):
                tensor = self._tensor(parameter, name)
                shape = list(tensor.shape)
                rows, numel = shape[dim], int(isinstance(tensor, nn.Parameter))
                for size in shape[1 if self.block.kind == "experts" else 0 :]:
                    numel *= size
                where = f"{self.path}.{parameter}"
                if not rows or rows % count_rows(layout, counts):
                    sizes = ", ".join(f"{key} {value}" for key, value in counts.items())
                    raise ModelError(f"{where}: {rows} rows do not fit the layout {layout!r} with {sizes}")
                yield from _parts(where, dim, numel // rows, layout, counts, units, rows // count_rows(layout, counts))


def _parts(
    param: str, dim: int, numel: int, layout: str, counts: dict[str, int], units: int, rows: int
) -> Iterator[Coupling]:
    """Make one coupling for each part of a layout.

    Args:
        param: the parameter's full name.
        dim: the dimension of its rows.
        numel: parameters in a row.
        layout: its layout.
        counts: ``H`` and ``K``, ``I``, or ``E``.
        units: number of units.
        rows: rows of one head, or of one channel.
    """
    totals = {part: counts.get(size, 0) for part, size in SIZES.items()}
    parts = layout.strip("()").split("+")
    shared = {part for part in parts if totals[part] < units}
    if layout.startswith("("):
        groups = min(totals[part] for part in parts)
        sizes = [totals[part] // groups * rows for part in parts]
        if not shared:
            yield Coupling(param, dim, sum(sizes) * groups // units, numel)
            return
        run = units // groups
        for index, part in enumerate(parts):
            if part not in shared:
                yield Coupling(param, dim, sizes[index] // run, numel, sum(sizes[:index]), run, sum(sizes))
        return
    offset = 0
    for part in parts:
        if part not in shared:
            yield Coupling(param, dim, totals[part] * rows // units, numel, offset)
        offset += totals[part] * rows
