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
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter
from transformers import PreTrainedConfig

from flapkit.system.errors import InputError, ModelError

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


_FAMILY = TypeAdapter(Family)


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
