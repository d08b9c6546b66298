"""Everything that a plugin may import: the interfaces, the data that they exchange, and functions for components.

A component is a subclass, written as a frozen dataclass: its fields are its options in a recipe, and its class
attribute ``name`` is its name there. Components hold options, never the state of a run.

Plugins import only from this module; the rest of flapkit may change at any time.
"""

from __future__ import annotations

from flapkit.checkpoint.export import EXPORTS
from flapkit.checkpoint.formats import Checkpoint, Exporter, Prospect, Runner
from flapkit.checkpoint.load import DType, load, open_weights
from flapkit.hookspecs import hookimpl
from flapkit.model.adapter import ArchitectureAdapter, FamilyAdapter
from flapkit.model.budget import Budget, BudgetBase, Cost, Measure, Rounding, unit_costs
from flapkit.model.classes import PRUNED_KEYS, dense_config
from flapkit.model.declaration import Block, Family
from flapkit.model.derive import Auto
from flapkit.model.empty import skeleton
from flapkit.model.plan import PruningPlan
from flapkit.model.resize import count_rows, is_conv1d, is_linear, rows_of, tensor_of
from flapkit.model.site import Coupling, Kind, Site, groups
from flapkit.model.surgery import Correction
from flapkit.pruning.angles import Angles
from flapkit.pruning.components import (
    Compensator,
    ImportanceMetric,
    Objective,
    StructureSearcher,
    TrainedSearcher,
    TrialSearcher,
)
from flapkit.pruning.contributions import Contributions
from flapkit.pruning.gates import Gates
from flapkit.pruning.gram import (
    FittedGram,
    FittedTargetGram,
    Gram,
    HeldOutGram,
    HeldOutTargetGram,
    TargetGram,
    UnitGram,
)
from flapkit.pruning.knapsack import remove_cheapest
from flapkit.pruning.moments import Moments, Spread
from flapkit.pruning.ranking import (
    layer_ratios,
    raise_attention,
    remove_by_layer,
    remove_lowest,
    remove_units,
    split_modules,
    standardise,
    whole_units,
)
from flapkit.pruning.recovery import Recovery, Trainable, Training, divergence, next_token_loss
from flapkit.pruning.statistics import GradientStatistic, LayerStatistic, SiteStatistics, Statistic
from flapkit.system.errors import (
    BudgetError,
    CalibrationError,
    DataError,
    FlapkitError,
    InputError,
    ModelError,
    PluginError,
    RecipeError,
    RunError,
    did_you_mean,
)
from flapkit.system.float64 import column_sums, float64_rows
from flapkit.system.options import Count, File, PathText
from flapkit.text.tokenise import tokenise

__all__ = [
    "EXPORTS",
    "PRUNED_KEYS",
    "Angles",
    "ArchitectureAdapter",
    "Auto",
    "Block",
    "Budget",
    "BudgetBase",
    "BudgetError",
    "CalibrationError",
    "Checkpoint",
    "Compensator",
    "Contributions",
    "Correction",
    "Cost",
    "Count",
    "Coupling",
    "DType",
    "DataError",
    "Exporter",
    "Family",
    "FamilyAdapter",
    "File",
    "FittedGram",
    "FittedTargetGram",
    "FlapkitError",
    "Gates",
    "GradientStatistic",
    "Gram",
    "HeldOutGram",
    "HeldOutTargetGram",
    "ImportanceMetric",
    "InputError",
    "Kind",
    "LayerStatistic",
    "Measure",
    "ModelError",
    "Moments",
    "Objective",
    "PathText",
    "PluginError",
    "Prospect",
    "PruningPlan",
    "RecipeError",
    "Recovery",
    "Rounding",
    "RunError",
    "Runner",
    "Site",
    "SiteStatistics",
    "Spread",
    "Statistic",
    "StructureSearcher",
    "TargetGram",
    "Trainable",
    "TrainedSearcher",
    "Training",
    "TrialSearcher",
    "UnitGram",
    "column_sums",
    "count_rows",
    "dense_config",
    "did_you_mean",
    "divergence",
    "float64_rows",
    "groups",
    "hookimpl",
    "is_conv1d",
    "is_linear",
    "layer_ratios",
    "load",
    "next_token_loss",
    "open_weights",
    "raise_attention",
    "remove_by_layer",
    "remove_cheapest",
    "remove_lowest",
    "remove_units",
    "rows_of",
    "skeleton",
    "split_modules",
    "standardise",
    "tensor_of",
    "tokenise",
    "unit_costs",
    "whole_units",
]
