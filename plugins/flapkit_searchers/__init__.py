"""flapkit's own structure searchers."""

from __future__ import annotations

from collections.abc import Iterable

from flapkit import hookimpl
from flapkit.interfaces import StructureSearcher
from flapkit_searchers.al_am import ALAM
from flapkit_searchers.al_mm import ALMM
from flapkit_searchers.depth import Depth
from flapkit_searchers.evolution import Evolution
from flapkit_searchers.gates import GateTraining
from flapkit_searchers.knapsack import Knapsack
from flapkit_searchers.optuna import Optuna
from flapkit_searchers.per_parameter import PerParameter
from flapkit_searchers.plan import Plan
from flapkit_searchers.ul_mm import ULMM
from flapkit_searchers.ul_um import ULUM


@hookimpl
def flapkit_searchers() -> Iterable[type[StructureSearcher]]:
    """Offer the default searchers."""
    return [ALAM, ALMM, ULMM, ULUM, Depth, Evolution, GateTraining, Knapsack, Optuna, PerParameter, Plan]
