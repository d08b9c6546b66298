"""Check what a recipe will do, from the recipe and the model's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flapkit.checkpoint.folder import check_output
from flapkit.checkpoint.load import load_tokenizer
from flapkit.checkpoint.serving import vllm_obstacle
from flapkit.execution.lightning.loggers import check_loggers
from flapkit.model.budget import Budget, prunable
from flapkit.model.empty import skeleton
from flapkit.model.positions import check_lengths
from flapkit.pruning.components import recovery_of
from flapkit.pruning.rounding import unaligned_widths
from flapkit.recipe.load import LoadedRecipe
from flapkit.run.budget import check_floors, open_budget
from flapkit.run.captured import capture_warnings
from flapkit.run.dtypes import DTypes, choose_dtypes
from flapkit.run.estimate import Estimate, check_fits, empty_model, estimate_needs
from flapkit.run.executors import check_execution, open_runtime
from flapkit.run.ledger import CostRow, ledger
from flapkit.run.lengths import recovery_length, run_lengths
from flapkit.run.pace import measure_pace
from flapkit.run.presets import Better, Nearest, find_better, find_nearest
from flapkit.run.target import Target, find_target
from flapkit.run.text import check_text, recovery_source, render_prompts
from flapkit.system.workdir import WorkDir, check_space


@dataclass(frozen=True, slots=True)
class Checked:
    """What a run will do and need.

    Args:
        target: the model's configuration, adapter and sites.
        params: parameters of the dense model.
        budget: how much will be removed.
        costs: what the model costs before and, with a plan that fits the budget, after.
        needs: memory, disk and compute.
        dtypes: the dtypes of the computation and of the written checkpoint.
        pace: floating-point operations a second of matrix products here, of all processes of the run together.
        processes: how many processes share a machine's memory.
        unaligned: widths of MLPs that will probably not be multiples of ``KERNELS``, which is slow.
        left: the files of an interrupted run in the output's work folder.
        warnings: warnings that the run will give, as far as they are known.
        unserved: why vLLM will not serve the pruned model; empty if it will.
        preset: the preset that the recipe is, or is nearest to.
        better: presets that are better than that one, with what the recipe would need with their methods.
    """

    target: Target
    params: int
    budget: Budget
    costs: Sequence[CostRow]
    needs: Estimate
    dtypes: DTypes
    preset: Nearest
    better: Sequence[Better]
    pace: float
    processes: int = 1
    unaligned: Sequence[int] = ()
    left: Sequence[str] = ()
    warnings: Sequence[str] = ()
    unserved: str = ""


def check(recipe: LoadedRecipe, *, overwrite: bool = False, force: bool = False) -> Checked:
    """Check a recipe as far as possible without running it, and estimate what the run needs.

    Args:
        recipe: the recipe.
        overwrite: the run may replace an output folder that flapkit wrote.
        force: the run may need more memory than is available.

    Raises:
        FlapkitError: the recipe cannot be run.
    """
    settings = recipe.recipe
    check_output(recipe.output, overwrite=overwrite)
    with capture_warnings() as warnings:
        target = find_target(recipe)
    check_text(settings)
    check_execution(recipe, target)
    check_loggers(settings.trainer.logger)
    tokenizer = load_tokenizer(settings.model.source, revision=settings.model.revision)
    render_prompts(settings.evaluate.samples, target.adapter, tokenizer)
    recovery = recovery_of(recipe.compensators)
    with capture_warnings() as of_lengths:
        training = {} if recovery is None else recovery_length(recovery.training)
        check_lengths(skeleton(target.config), run_lengths(settings, tokenizer, target.adapter) | training)
    if recovery is not None:
        recovery_source(recovery.training, settings)
    runtime = open_runtime(settings.trainer)
    dtypes = choose_dtypes(settings.model, target.config, runtime.device)
    empty = empty_model(target, dtypes)
    params = empty.num_parameters()
    opened = open_budget(recipe, target, params, dtypes.saved)
    needs = estimate_needs(recipe, target, empty, opened.budget, dtypes, runtime.processes)
    check_space(recipe.output, needs.disk)
    if not force:
        check_fits(recipe, needs, runtime)
    # Last: it needs memory for every unit.
    plan, preset = check_floors(recipe, target.sites, opened.budget), find_nearest(recipe)
    return Checked(
        target=target,
        params=params,
        budget=opened.budget,
        costs=ledger(opened.budget, opened.costs, target.sites, plan),
        needs=needs,
        dtypes=dtypes,
        preset=preset,
        better=find_better(recipe, preset, target, dtypes, runtime.processes),
        pace=measure_pace(runtime.device, empty.dtype) * runtime.processes,
        processes=runtime.per_machine,
        unaligned=unaligned_widths(target.sites, plan),
        left=WorkDir(recipe.output).records(),
        warnings=[*warnings, *of_lengths],
        unserved=vllm_obstacle(
            target.config,
            target.sites,
            may_remove=recipe.searcher.removes_blocks(prunable(target.sites, settings.budget.base)),
        ),
    )
