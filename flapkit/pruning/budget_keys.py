"""What a budget is asked for by: the keys of a recipe's ``budget``, which ``prune_`` takes, too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from flapkit.model.budget import BudgetBase, Rounding
from flapkit.system.options import Count, Section
from flapkit.system.sizes import BYTES, parse_bytes, parse_count


def _check_fraction(value: Any, what: str, example: float) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is None or (is_number and math.isfinite(value) and 0 < value < 1):
        return value
    shown = f"{value / 100:g}" if is_number and 1 < value < 100 else f"{example:g}"
    raise PydanticCustomError(
        "ratio",
        f"{{value}} is not a ratio; give {what}, between 0 and 1, for example {{shown}}",
        {"value": _as_written(value), "shown": shown},
    )


def _as_written(value: Any) -> str:
    return repr(value) if isinstance(value, str) else json.dumps(value, default=str)


def _check_ratio(value: Any) -> Any:
    return _check_fraction(value, "the fraction to remove", 0.2)


def _check_left(value: Any) -> Any:
    return _check_fraction(value, "the fraction of the dense model's to leave", 0.5)


def _check_count(value: Any) -> Any:
    try:
        is_count = value is None or parse_count(str(value)) > 0
    except ValueError:
        is_count = False
    if not is_count or isinstance(value, (bool, float)):
        raise PydanticCustomError(
            "count",
            "{value} is not a number of parameters; give one with K, M, B or T, for example 100M",
            {"value": _as_written(value)},
        )
    return value


def _check_bytes(value: Any) -> Any:
    try:
        is_size = value is None or (isinstance(value, str) and parse_bytes(value) > 0)
    except ValueError:
        is_size = False
    if not is_size:
        raise PydanticCustomError(
            "bytes",
            "{value} is not a size of weights; give a number with {units}, for example 200MB",
            {"value": _as_written(value), "units": " or ".join(", ".join(BYTES).rsplit(", ", 1))},
        )
    return value


Left = Annotated[float | None, BeforeValidator(_check_left)]
"""A fraction of the dense model's cost that is left."""

Params = Annotated[str | int | None, BeforeValidator(_check_count)]
"""How many parameters are left, such as ``100M``."""

BUDGETS: Mapping[str, tuple[str, ...]] = {
    "ratio": ("of",),
    "params": (),
    "active_params": (),
    "memory": ("dtype",),
    "kv_cache": (),
    "latency": ("on", "batch", "prompt"),
}
"""Kind of budget -> the keys that go with it alone."""


class BudgetSection(Section):
    """How much to remove: exactly one of `ratio`, `params`, `active_params`, `memory`, `kv_cache` and `latency`.

    A ratio sets how much is removed; each of the others sets the most that may be left.
    """

    ratio: Annotated[float | None, BeforeValidator(_check_ratio)] = Field(
        default=None, gt=0, lt=1, description="Fraction of the parameters to remove."
    )
    of: BudgetBase = Field(
        default="blocks",
        description="What the ratio is a fraction of: `blocks` (all parameters of the attentions and MLPs), "
        "`model` (all parameters, with embeddings and head), `attention`, `mlp` or `mixture` (these alone; only they "
        "are pruned).",
    )
    params: Params = Field(
        default=None, description="Parameters of the pruned model, with the biases of the compensator, such as `100M`."
    )
    active_params: Params = Field(
        default=None,
        description="Parameters of the pruned model that one token uses: like `params`, but only as many experts of a "
        "mixture count as the router chooses for a token.",
    )
    memory: Annotated[str | None, BeforeValidator(_check_bytes)] = Field(
        default=None, description="Bytes of the pruned model's weights, such as `200MB` or `1.5GiB`."
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        default=None, description="Type in which `memory` counts weights; that of the written weights if not given."
    )
    kv_cache: Left = Field(
        default=None,
        gt=0,
        lt=1,
        description="Fraction of the KV cache that is left, in bytes per token. Only attention is pruned.",
    )
    latency: Left = Field(
        default=None,
        gt=0,
        lt=1,
        description="Fraction of the time that is left, according to the table that `flapkit bench MODEL --blocks` "
        "makes on this machine.",
    )
    on: Literal["decode", "prefill"] = Field(
        default="decode", description="What `latency` times: a generated token, or a whole prompt."
    )
    batch: Count = Field(default=1, ge=1, description="Prompts at once, for `latency`.")
    prompt: Count = Field(default=512, ge=1, description="Tokens of a prompt, for `latency`.")
    multiple_of: Count = Field(
        default=1,
        ge=1,
        description="Round the width of every pruned MLP, and heads times head size of every pruned attention, to a "
        "multiple of this, with any searcher. A ratio is never exceeded; with another budget, up to one such step more "
        "may be left. 32 or 64 suit most kernels, 256 suits GGUF's K types.",
    )
    tensor_parallel: Count = Field(
        default=1,
        ge=1,
        description="Round heads and widths further, so that this many devices can share every layer, as vLLM's "
        "`--tensor-parallel-size` does: it divides query heads and widths in each layer, and divides key/value heads "
        "or is a multiple of them.",
    )
    head_counts: Count | None = Field(
        default=None,
        ge=1,
        description="The largest number of distinct key/value head counts over all layers; vLLM's attention has a "
        "group for each count. Heads are removed or restored so that the fewest change; if that removes too much, "
        "units of other sites are restored.",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> BudgetSection:
        kinds = [kind for kind in BUDGETS if getattr(self, kind) is not None]
        listed = ", ".join(list(BUDGETS)[:-1]) + f" and {list(BUDGETS)[-1]}"
        if not kinds:
            raise PydanticCustomError("budget", "expected one of {listed}", {"listed": listed})
        if len(kinds) > 1:
            raise PydanticCustomError(
                "budget",
                "expected one of {listed}, got {found}; remove all but one, or set it to null",
                {"listed": listed, "found": " and ".join(kinds)},
            )
        for kind, keys in BUDGETS.items():
            fields = type(self).model_fields
            if kind != kinds[0] and (misplaced := [key for key in keys if getattr(self, key) != fields[key].default]):
                raise PydanticCustomError(
                    "budget",
                    "`{key}` goes with `{kind}`, not with `{found}`; remove it",
                    {"key": misplaced[0], "kind": kind, "found": kinds[0]},
                )
        return self

    @model_serializer(mode="wrap")
    def _kind_alone(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write the keys of the budget's kind, and those of all kinds."""
        others = {key for kind, keys in BUDGETS.items() if kind != self.kind for key in (kind, *keys)}
        return {key: value for key, value in serialise(self).items() if key not in others}

    @property
    def kind(self) -> str:
        """The key that says how much."""
        return next(kind for kind in BUDGETS if getattr(self, kind) is not None)

    @property
    def asked(self) -> str:
        """What is asked to be left, such as ``kv_cache: 0.5``; empty for a ratio."""
        return "" if self.ratio is not None else f"{self.kind}: {getattr(self, self.kind)}"

    @property
    def rounding(self) -> Rounding:
        """The sizes that the pruned layers may have."""
        return Rounding(self.multiple_of, self.tensor_parallel, self.head_counts or 0)

    @property
    def base(self) -> BudgetBase:
        """The sites that can be pruned."""
        return "attention" if self.kv_cache is not None else self.of
