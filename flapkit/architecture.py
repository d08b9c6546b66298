"""Declare an architecture as data: where the blocks of a decoder layer are, and how their tensors are laid out.

```python
Family(
    name="stablelm",
    model_types=("stablelm",),
    layers="model.layers",
    blocks=(
        Block("attention", "self_attn", "o_proj", {"q_proj": "q", "k_proj": "k", "v_proj": "k"}),
        Block("mlp", "mlp", "down_proj", {"gate_proj": "i", "up_proj": "i"}),
    ),
)
```

A layout says what the rows of a parameter are: ``q`` query heads, ``k`` key/value heads, ``i`` channels of an MLP, each
in order; ``q+k+k`` one part after another in one tensor; ``(q+k+k)`` the parts interleaved, for each key/value head its
query heads, its key and its value. A bias follows its weight's rows.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flapkit.checkpoint.empty import build_empty, config_of
from flapkit.checkpoint.modeling_flapkit import columns_of, count, find, heads_of, rows_of
from flapkit.errors import InputError, ModelError
from flapkit.interfaces import ArchitectureAdapter
from flapkit.sites import Coupling, Site

Unit = Literal["kv_group", "query_head"]

LAYOUT = re.compile(r"[qk](\+[qk])*|\([qk](\+[qk])*\)|i(\+i)*|\(i(\+i)*\)")
NAMES = {"attention": {"H": 2, "K": 1, "D": 1}, "mlp": {"I": 1}, "experts": {"I": 1}}
"""Kind of a block -> what its expressions can name, with a value to try them on."""


EXPERT_MULTIPLE = 8
"""Grouped matrix products take widths of whole 16 bytes; experts of other widths run one by one."""

LONGEST_EXPRESSION = 100

OPERATORS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """Compute an expression of sizes and whole numbers with ``+``, ``*`` and ``//``.

    Raises:
        ValueError: it is something else.
    """

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        raise ValueError(f"{expression!r} is no expression of {', '.join(sizes)} with +, * and //")

    try:
        if len(expression) > LONGEST_EXPRESSION:
            raise ValueError(f"{expression[:LONGEST_EXPRESSION]!r}… is too long an expression")
        return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} cannot be computed: {error}") from error


@dataclass(frozen=True)
class Block:
    """One prunable part of a decoder layer: its attention, its MLP, or its experts.

    Args:
        kind: ``attention``, ``mlp``, or ``experts`` where the parameters of all experts are stacked in 3-D tensors.
        path: the module, from the decoder layer; empty for the layer itself. A layer without it is skipped.
        consumer: the linear whose input channels go, from ``path``; of experts the stacked parameter.
        parameters: what else goes with a unit, from ``path``: a module (weight and bias) or a parameter -> its layout.
            A name that ends in ``?`` may be absent.
        name: what the site is called in a layer; the kind if not given.
        attributes: counts that the module keeps -> an expression of what is left: ``H`` query heads, ``K`` key/value
            heads, ``D`` channels of a head, ``I`` channels, with ``+``, ``*`` and ``//``.
        reads: names that the module's forward reads from the configuration -> an expression of what is left.
        arguments: arguments of the module's forward -> the dimension that counts query heads, or batch times heads.
        outputs: submodules whose outputs' features are picked by head, while their own rows stay -> ``q`` or ``k``: a
            norm over a whole projection.
        heads: the configuration's name for the number of query heads.
        kv_heads: its name for the number of key/value heads, or that number; that of the query heads if it has none.
        width: the configuration's name for the channels of an MLP, under which a pruned layer's are saved.
        optional: a model may have it in none of its layers.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: Literal["attention", "mlp", "experts"]
    path: str
    consumer: str
    parameters: Mapping[str, str]
    name: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, int] = field(default_factory=dict)
    outputs: Mapping[str, Literal["q", "k"]] = field(default_factory=dict)
    heads: str = "num_attention_heads"
    kv_heads: str | int = "num_key_value_heads"
    width: str = "intermediate_size"
    optional: bool = False

    def __post_init__(self) -> None:
        """Fill in the name, and refuse layouts and expressions that say nothing.

        Raises:
            InputError: a layout or an expression that cannot be read, or does not suit the kind.
        """
        object.__setattr__(self, "name", self.name or self.kind)
        for name, layout in self.parameters.items():
            suits = ("i" in layout) == (self.kind != "attention")
            if not LAYOUT.fullmatch(layout) or not suits:
                known = "q, k, q+k+k, (q+k+k)" if self.kind == "attention" else "i, i+i, (i+i)"
                raise InputError(f"{self.name}: {name}: {layout!r} is no layout of {self.kind} (such as {known})")
        for name, expression in {**self.attributes, **self.reads}.items():
            try:
                evaluate(expression, NAMES[self.kind])
            except ValueError as error:
                raise InputError(f"{self.name}: {name}: {error}") from error

    @cached_property
    def data(self) -> dict[str, Any]:
        """The declaration as a checkpoint's configuration holds it."""
        return dataclasses.asdict(self)

    def counts(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the module's attributes where so much is left."""
        return {name: evaluate(expression, sizes) for name, expression in self.attributes.items()}

    def readings(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Return what the module's forward is to read from the configuration where so much is left."""
        values: dict[str, Any] = {name: evaluate(expression, sizes) for name, expression in self.reads.items()}
        if self.kind == "experts" and sizes["I"] % EXPERT_MULTIPLE:
            values["_experts_implementation"] = "eager"
        return values

    @property
    def takes_query_heads(self) -> bool:
        """Tell whether forward can do with fewer query heads for each key/value head: it counts them, or has one."""
        return isinstance(self.kv_heads, int) or any("//" in expression for expression in self.attributes.values())


@dataclass(frozen=True)
class Family:
    """A family of models whose decoder layers are built alike.

    Args:
        name: what recipes call the adapter.
        model_types: the configurations' ``model_type``, as in a checkpoint's config.json.
        layers: full name of the list of decoder layers.
        blocks: the prunable parts of a layer.
        about: a sentence on what it is, for ``flapkit list``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    model_types: tuple[str, ...]
    layers: str
    blocks: tuple[Block, ...]
    about: str = ""

    def adapter(self) -> type[FamilyAdapter]:
        """Make the adapter class that recipes can name."""
        about = self.about or f"Models of type {', '.join(self.model_types)}."
        members = {"name": self.name, "family": self, "__doc__": about, "__module__": __name__}
        made = type(f"{self.name.title().replace('_', '')}Adapter", (FamilyAdapter,), members)
        return dataclass(frozen=True)(made)


_FAMILY = TypeAdapter(Family)


@dataclass(frozen=True)
class FamilyAdapter(ArchitectureAdapter):
    """An adapter that reads a declaration; subclass it where the declaration depends on the configuration."""

    family: ClassVar[Family]

    unit: Annotated[
        Unit,
        Field(
            description="What an attention unit is: a key/value head with its query heads (kv_group), or a query head "
            "of which every key/value head keeps the same number (query_head). With one key/value head for all, it is "
            "a query head wherever the family allows it."
        ),
    ] = "kv_group"

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Tell whether the configuration is the family's, dense or pruned already."""
        return config.model_type.removeprefix("flapkit_") in cls.family.model_types

    def family_of(self, config: PreTrainedConfig) -> Family:
        """Return the declaration for a configuration; a subclass can choose among several."""
        return self.family

    def sites(self, config: PreTrainedConfig) -> tuple[Site, ...]:
        """List the sites, with sizes read off the tensors of a model that is never allocated.

        Raises:
            ModelError: the declaration does not fit the model.
        """
        return sites_of(skeleton(config), self.family_of(config), self.unit)


def check_causal(config: PreTrainedConfig) -> None:
    """Raise ``ModelError`` unless a configuration is of a decoder-only language model that transformers has."""
    if config.is_encoder_decoder:
        raise ModelError(f"models of type {config.model_type!r} are encoder-decoders; flapkit prunes decoder-only ones")
    if config.model_type.removeprefix("flapkit_") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"models of type {config.model_type!r} are no causal language models of transformers")


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a configuration's causal language model without its memory; the same one is built once.

    Raises:
        ModelError: transformers has no causal language model for it, or cannot build it.
    """
    check_causal(config)
    of: Any = type(config)
    return _skeleton(of, json.dumps(config.to_dict(), default=str, sort_keys=True))


@lru_cache(maxsize=4)
def _skeleton(of: type[PreTrainedConfig], text: str) -> PreTrainedModel:
    model = build_empty(config_of(of, json.loads(text)))
    model.tie_weights()
    return model


def declaration_of(config: PreTrainedConfig) -> Family:
    """Return the declaration that a pruned model's configuration holds.

    Raises:
        ModelError: it holds none: the model is dense.
    """
    declared = getattr(config, "flapkit", None)
    if declared is None:
        raise ModelError(
            f"this configuration of type {config.model_type!r} declares no blocks: flapkit did not write it"
        )
    dense = config.model_type.removeprefix("flapkit_")
    try:
        return _FAMILY.validate_python({**declared, "name": dense, "model_types": (dense,)})
    except (TypeError, ValueError, InputError) as error:
        raise ModelError(f"what the configuration declares as its blocks is damaged: {error}") from error


def sites_of(model: PreTrainedModel, family: Family, unit: Unit = "kv_group") -> tuple[Site, ...]:
    """List a model's sites as a declaration says, in the model's order.

    Args:
        model: a causal language model, with or without memory.
        family: its declaration.
        unit: what an attention unit is.

    Raises:
        ModelError: the declaration does not fit the model, and what does not.
    """
    try:
        layers = model.get_submodule(family.layers)
    except AttributeError as error:
        raise ModelError(f"adapter {family.name!r}: this {type(model).__name__} has no {family.layers}") from error
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"adapter {family.name!r}: {family.layers} is a {type(layers).__name__}, not a list of layers")
    found: list[Site] = []
    used: set[int] = set()
    for index, layer in enumerate(layers):
        for number, block in enumerate(family.blocks):
            module = find(layer, block.data)
            if module is not None:
                used.add(number)
                path = ".".join(part for part in (family.layers, str(index), block.path) if part)
                found += _Place(model, module, block, path, index).sites(unit)
    for number, block in enumerate(family.blocks):
        if number not in used and not block.optional:
            where = ".".join(part for part in (block.path, block.consumer) if part)
            raise ModelError(f"adapter {family.name!r}: no layer of {family.layers} has {where}, its {block.name}")
    return tuple(found)


@dataclass(frozen=True)
class _Place:
    """One block of one layer."""

    model: PreTrainedModel
    module: nn.Module
    block: Block
    path: str
    layer: int

    def sites(self, unit: Unit) -> Iterator[Site]:
        consumer, dim = columns_of(self.module, self.block.data)
        weight = self.module.get_parameter(consumer)
        counts = self._counts(weight.shape[dim] if weight.numel() else 0)
        units, runs = self._units(counts, unit)
        name = f"layers.{self.layer}.{self.block.name}"
        experts: Sequence[int | None] = range(len(weight)) if self.block.kind == "experts" else [None]
        couplings = tuple(self._couplings(counts, units))
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
                path=self.path,
                block=self.block,
            )

    def _parameter(self, parameter: str, name: str) -> nn.Parameter:
        try:
            return self.module.get_parameter(parameter)
        except AttributeError as error:
            raise ModelError(f"{self.path}: the adapter names {name}, which is not there") from error

    def _counts(self, channels: int) -> dict[str, int]:
        if not channels:
            raise ModelError(f"layers.{self.layer}.{self.block.name}: {self.block.consumer} has no channel")
        if self.block.kind != "attention":
            return {"I": channels}
        try:
            counts = heads_of(self.model.config.per_layer_config[self.layer], self.block.data)
        except AttributeError as error:
            raise ModelError(f"layers.{self.layer}.{self.block.name}: {error}") from error
        if not all(isinstance(heads, int) and heads > 0 for heads in counts.values()):
            raise ModelError(f"layers.{self.layer}.{self.block.name}: the configuration counts {counts} heads")
        if channels % counts["H"] or counts["H"] % counts["K"]:
            raise ModelError(
                f"layers.{self.layer}.{self.block.name}: {channels} channels of {self.block.consumer}, "
                f"{counts['H']} query heads and {counts['K']} key/value heads do not divide"
            )
        return counts

    def _units(self, counts: dict[str, int], unit: Unit) -> tuple[int, int]:
        """Return how many units there are, and how many equal runs they come in."""
        if self.block.kind != "attention":
            return counts["I"], 1
        if counts["K"] == 1 and self.block.takes_query_heads:
            return counts["H"], 1
        if unit == "kv_group" or counts["K"] == counts["H"]:
            return counts["K"], 1
        if not self.block.takes_query_heads:
            raise ModelError(
                f"unit: query_head: models of type {self.model.config.model_type!r} need all query heads of a "
                "key/value head; use kv_group"
            )
        return counts["H"], counts["K"]

    def _couplings(self, counts: dict[str, int], units: int) -> Iterator[Coupling]:
        for name, layout in self.block.parameters.items():
            for parameter, dim in rows_of(self.module, self.block.data, name):
                shape = list(self._parameter(parameter, name).shape)
                rows, numel = shape[dim], 1
                for size in shape[1 if self.block.kind == "experts" else 0 :]:
                    numel *= size
                where = f"{self.path}.{parameter}"
                if not rows or rows % count(layout, counts):
                    said = ", ".join(f"{key} {value}" for key, value in counts.items())
                    raise ModelError(f"{where}: its {rows} rows cannot be laid out as {layout!r} with {said}")
                yield from _parts(where, dim, numel // rows, layout, counts, units, rows // count(layout, counts))


def _parts(
    param: str, dim: int, numel: int, layout: str, counts: dict[str, int], units: int, rows: int
) -> Iterator[Coupling]:
    """Say which rows go with a unit, for each part of a layout.

    Args:
        param: the parameter's full name.
        dim: the dimension that counts its rows.
        numel: parameters in a row.
        layout: its layout.
        counts: ``H`` and ``K``, or ``I``.
        units: how many units there are.
        rows: rows of one head, or of one channel.
    """
    totals = {"q": counts.get("H", 0), "k": counts.get("K", 0), "i": counts.get("I", 0)}
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
