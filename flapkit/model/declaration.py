"""Declarations: an architecture as data.

A declaration names the prunable blocks of a decoder layer and the layout of their tensors.

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

A layout describes the rows of a parameter: ``q`` query heads, ``k`` key/value heads, ``i`` MLP channels or ``e``
experts, in order.
``q+k+k`` is a fused tensor with one part after another; ``(q+k+k)`` interleaves the parts: for each key/value head, its
query heads, its key and its value. A bias has its weight's layout.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter

from flapkit.model.registration import dense_type
from flapkit.system.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Unit = Literal["kv_group", "query_head"]

UnitOption = Literal["auto", "kv_group", "query_head"]

ExpertUnit = Literal["channel", "expert", "both"]

LAYOUTS = {
    "attention": (re.compile(r"[qk](\+[qk])*|\([qk](\+[qk])*\)"), "q, k, q+k+k, (q+k+k)"),
    "mlp": (re.compile(r"i(\+i)*|\(i(\+i)*\)"), "i, i+i, (i+i)"),
    "experts": (re.compile(r"i(\+i)*|\(i(\+i)*\)"), "i, i+i, (i+i)"),
    "mixture": (re.compile("e"), "e"),
}
"""Kind of a block -> its layouts, and examples of them."""

NAMES = {"attention": {"H": 2, "K": 1, "D": 1}, "mlp": {"I": 1}, "experts": {"I": 1}, "mixture": {"E": 1}}
"""Kind of a block -> the names its expressions may use, each with a value for a trial evaluation."""


EXPERT_MULTIPLE = 8
"""Grouped matrix products need rows of whole 16 bytes; experts of other widths run one by one."""

LONGEST_EXPRESSION = 100

OPERATORS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """Evaluate an expression of sizes and whole numbers with ``+``, ``*`` and ``//``.

    Raises:
        ValueError: the expression is invalid.
    """

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        raise ValueError(f"{expression!r} is not an expression of {', '.join(sizes)} with +, * and //")

    try:
        if len(expression) > LONGEST_EXPRESSION:
            raise ValueError(f"expression is longer than {LONGEST_EXPRESSION} characters: {expression[:30]!r}…")
        return value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"{expression!r} cannot be evaluated: {error}") from error


@dataclass(frozen=True)
class Block:
    """One prunable part of a decoder layer: its attention, its MLP, its experts, or its mixture of experts.

    Args:
        kind: ``attention``, ``mlp``, ``experts`` (the parameters of all experts stacked in 3-D tensors, which lose
            channels), or ``mixture`` (the same experts with their router, which loses whole experts).
        path: the module, relative to the decoder layer; empty for the layer itself. Layers without it are skipped.
        consumer: the linear whose input channels are removed, relative to ``path``; for experts, the stacked parameter.
        parameters: the coupled tensors, relative to ``path``: a module (weight and bias) or a parameter -> its layout.
            A name that ends in ``?`` may be absent.
        name: the site's name within a layer; ``kind`` by default.
        attributes: size attributes of the module -> an expression of the sizes kept: ``H`` query heads, ``K`` key/value
            heads, ``D`` channels per head, ``I`` MLP channels, ``E`` experts, with ``+``, ``*`` and ``//``.
        reads: configuration entries that the module's forward reads -> an expression of the sizes kept.
        arguments: arguments of the module's forward -> the dimension of size query heads, or batch times query heads.
        outputs: submodules whose output features are selected by head while their own rows stay, such as a norm over a
            whole projection -> ``q`` or ``k``.
        heads: the configuration's entry for the number of query heads.
        kv_heads: the configuration's entry for the number of key/value heads, or the number itself. Where the
            configuration has no such entry, the number of query heads.
        width: the configuration's entry for the MLP's width, or for a mixture's number of experts; a pruned layer's
            number is saved under it.
        router: of a mixture, the module that chooses a token's experts, relative to ``path``.
        optional: a model may lack this block in all of its layers.
        removable: the block can lose all of its units; its module then returns the bias of its consumer. Not for
            experts.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: Literal["attention", "mlp", "experts", "mixture"]
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
    router: str = ""
    optional: bool = False
    removable: bool = True

    def __post_init__(self) -> None:
        """Fill in the name, and check layouts and expressions.

        Raises:
            InputError: a layout or an expression is invalid, or does not suit the kind.
        """
        object.__setattr__(self, "name", self.name or self.kind)
        pattern, known = LAYOUTS[self.kind]
        for name, layout in self.parameters.items():
            if not pattern.fullmatch(layout):
                raise InputError(f"{self.name}: {name}: {layout!r} is not a layout of {self.kind} (such as {known})")
        if (self.kind == "mixture") != bool(self.router):
            raise InputError(f"{self.name}: a mixture, and no other block, names its `router`")
        for name, expression in {**self.attributes, **self.reads}.items():
            try:
                evaluate(expression, NAMES[self.kind])
            except ValueError as error:
                raise InputError(f"{self.name}: {name}: {error}") from error

    @cached_property
    def data(self) -> dict[str, Any]:
        """The declaration as stored in a checkpoint's configuration."""
        return dataclasses.asdict(self)

    def counts(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the module's size attributes for the given sizes."""
        return {name: evaluate(expression, sizes) for name, expression in self.attributes.items()}

    def readings(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Return the configuration entries that the module's forward reads, for the given sizes."""
        values: dict[str, Any] = {name: evaluate(expression, sizes) for name, expression in self.reads.items()}
        if self.kind == "experts" and sizes["I"] % EXPERT_MULTIPLE:
            values["_experts_implementation"] = "eager"
        return values

    @property
    def takes_query_heads(self) -> bool:
        """Whether query heads can be removed one by one: forward counts them per key/value head, or has one KV head."""
        return isinstance(self.kv_heads, int) or any("//" in expression for expression in self.attributes.values())


@dataclass(frozen=True)
class Family:
    """A family of models with the same structure of decoder layers.

    Args:
        name: the adapter's name in recipes.
        model_types: ``model_type`` of the configurations, as in a checkpoint's config.json.
        layers: full name of the list of decoder layers.
        blocks: the prunable blocks of a layer.
        about: a one-sentence description for ``flapkit list``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    model_types: tuple[str, ...]
    layers: str
    blocks: tuple[Block, ...]
    about: str = ""

    def __hash__(self) -> int:
        """Hash what tells families apart: blocks hold mappings, which have no hash."""
        return hash((self.name, self.model_types, self.layers))


def with_experts(family: Family, unit: ExpertUnit) -> Family:
    """Return a declaration in which experts lose channels, or mixtures lose whole experts, or both.

    Args:
        family: a declaration, with or without experts.
        unit: what is removed: channels of every expert, whole experts, or both: whole experts, and channels of those
            that stay.

    Raises:
        ModelError: whole experts are to be removed, and the declaration has no mixture.
    """
    kinds = {block.kind for block in family.blocks}
    if unit != "channel" and "mixture" not in kinds:
        what = "names no router of its experts" if "experts" in kinds else "has no experts"
        raise ModelError(f"expert_unit: {unit}: the declaration of {family.name!r} {what}; use channel")
    if unit == "both":
        # A mixture comes before its experts: a repair in order sees the tokens that experts get when others are gone.
        return dataclasses.replace(
            family, blocks=tuple(sorted(family.blocks, key=lambda block: block.kind == "experts"))
        )
    other = "experts" if unit == "expert" else "mixture"
    return dataclasses.replace(family, blocks=tuple(block for block in family.blocks if block.kind != other))


_FAMILY = TypeAdapter(Family)


def declaration_of(config: PreTrainedConfig) -> Family:
    """Return the declaration stored in a pruned model's configuration.

    Raises:
        ModelError: the configuration has no declaration: the model is dense.
    """
    declared = getattr(config, "flapkit", None)
    if declared is None:
        raise ModelError(
            f"the configuration of type {config.model_type!r} has no flapkit declaration; flapkit did not write it"
        )
    dense = dense_type(config.model_type)
    try:
        return _FAMILY.validate_python({**declared, "name": dense, "model_types": (dense,)})
    except (TypeError, ValueError, InputError) as error:
        raise ModelError(f"the flapkit declaration in the configuration is damaged: {error}") from error
