"""Budgets: how much to remove, and of what."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from flapkit.model.site import Site
from flapkit.system.errors import BudgetError, did_you_mean

BudgetBase = Literal["blocks", "model", "attention", "mlp", "mixture"]


@dataclass(frozen=True, slots=True)
class Budget:
    """How much to remove, and of what, as an exact number of parameters.

    Args:
        ratio: fraction of ``base`` to remove.
        of: what the ratio refers to: ``blocks`` (all prunable parameters), ``model`` (all parameters, with embeddings
            and head), ``attention``, ``mlp`` or ``mixture`` (only these sites, and only they are pruned).
        base: number of parameters that the ratio refers to.
        multiple_of: round pruned widths (input channels of consumers) to a multiple of this, with every searcher.
        tensor_parallel: round them further, so that this many devices can share every layer.
    """

    ratio: float
    of: BudgetBase
    base: int
    multiple_of: int = 1
    tensor_parallel: int = 1

    @classmethod
    def over(
        cls,
        sites: Iterable[Site],
        ratio: float,
        of: BudgetBase = "blocks",
        model_params: int = 0,
        multiple_of: int = 1,
        tensor_parallel: int = 1,
    ) -> Budget:
        """Make a budget from a ratio, counting its base over a model's sites.

        Args:
            sites: all sites of the model.
            ratio: at least 0 and below 1.
            of: what the ratio refers to.
            model_params: number of parameters of the model; needed if ``of`` is ``model``.
            multiple_of: round pruned widths to a multiple of this.
            tensor_parallel: round them further, so that this many devices can share every layer.

        Raises:
            BudgetError: the ratio is not in [0, 1), or ``of`` is unknown.
        """
        if of not in get_args(BudgetBase):
            raise BudgetError(f"budget.of: unknown base {of!r}{did_you_mean(of, get_args(BudgetBase))}")
        if not (isinstance(ratio, (int, float)) and math.isfinite(ratio) and 0 <= ratio < 1):
            raise BudgetError(
                f"budget.ratio: {ratio} is out of range; give the fraction to remove, at least 0 and below 1"
            )
        base = model_params if of == "model" else sum(site.params for site in prunable(sites, of))
        if of == "mixture" and not base:
            raise BudgetError(
                "budget.of: mixture: the model has no mixture whose experts can be removed whole; for one of experts, "
                "set adapter: {name: auto, expert_unit: expert}"
            )
        return cls(ratio, of, base, multiple_of, tensor_parallel)

    @property
    def params(self) -> int:
        """Number of parameters to remove."""
        return round(self.ratio * self.base)


def prunable(sites: Iterable[Site], of: BudgetBase) -> tuple[Site, ...]:
    """Return the sites that a budget's base allows to be pruned."""
    return tuple(site for site in sites if of in ("blocks", "model") or site.kind == of)
