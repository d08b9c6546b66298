"""Say what a recipe will do, from its text and the model's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flapkit.checkpoint.folder import check_output
from flapkit.checkpoint.load import load_tokenizer
from flapkit.execution.lightning.loggers import check_loggers
from flapkit.model.plan import Budget, PruningPlan
from flapkit.pruning.components import recovery_of
from flapkit.pruning.method import find_plan
from flapkit.pruning.rounding import unaligned_widths
from flapkit.recipe.load import LoadedRecipe
from flapkit.run.estimate import Estimate, check_fits, empty_model, estimate_needs
from flapkit.run.executors import check_execution, open_runtime
from flapkit.run.target import Target, find_target
from flapkit.run.tasks import check_tasks
from flapkit.run.text import recovery_source
from flapkit.system.errors import BudgetError
from flapkit.system.workdir import WorkDir, check_space


@dataclass(frozen=True, slots=True)
class Checked:
    """What a run will do and need.

    Args:
        target: the model's configuration, adapter and sites.
        params: parameters of the dense model.
        budget: how many parameters will go.
        needs: memory, disk and compute.
        processes: how many share a machine's memory.
        unaligned: widths of MLPs that will probably not be multiples of 32, which kernels and quantised formats need.
        left: what a stopped run has left in the output's work folder.
    """

    target: Target
    params: int
    budget: Budget
    needs: Estimate
    processes: int = 1
    unaligned: Sequence[int] = ()
    left: Sequence[str] = ()


def check(recipe: LoadedRecipe, *, overwrite: bool = False, force: bool = False) -> Checked:
    """Check all that can be known without running, and estimate what the run needs.

    Args:
        recipe: what is to be done.
        overwrite: it may replace an output folder that flapkit wrote.
        force: it may take more memory than there is.

    Raises:
        FlapkitError: the recipe cannot be carried out.
    """
    asked = recipe.recipe
    check_output(Path(asked.output).expanduser(), overwrite=overwrite)
    target = find_target(recipe)
    for text in (asked.calibration, *asked.evaluate.perplexity):
        text.check()
    if asked.evaluate.zero_shot is not None:
        check_tasks(asked.evaluate.zero_shot)
    check_execution(recipe, target)
    check_loggers(asked.trainer.logger)
    load_tokenizer(asked.model.path, revision=asked.model.revision)
    recovery = recovery_of(recipe.compensators)
    if recovery is not None:
        recovery_source(recovery.training, asked).check()
    empty = empty_model(asked, target)
    params = empty.num_parameters()
    budget = asked.budget.over(target.sites, params)
    runtime = open_runtime(asked.trainer)
    needs = estimate_needs(recipe, target, empty, budget, runtime.processes)
    output = Path(asked.output).expanduser()
    check_space(output, needs.disk)
    if not force:
        check_fits(recipe, needs, runtime)
    # Last: it takes memory for every unit.
    plan = _check_floors(recipe, target, budget)
    return Checked(
        target,
        params,
        budget,
        needs,
        runtime.per_machine,
        unaligned_widths(target.sites, plan),
        WorkDir(output).records(),
    )


def _check_floors(recipe: LoadedRecipe, target: Target, budget: Budget) -> PruningPlan:
    """Let the searcher try the budget on equal scores: whether the floors allow it depends on sizes alone.

    Returns:
        A plan of the widths that a run may come to, if not of its units.
    """
    scores = {site.name: torch.arange(site.units, dtype=torch.float64).view(-1, 1) for site in target.sites}
    try:
        return find_plan(target.sites, scores, recipe.searcher, budget)
    except BudgetError as error:
        raise BudgetError(f"{recipe.path}: {error}") from error
