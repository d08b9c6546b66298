"""Open what a recipe names: its model, whole, layer by layer, or sharded over processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flapkit.checkpoint.load import load, open_weights
from flapkit.checkpoint.weights import Weights
from flapkit.execution.executor import CalibrationText, Executor
from flapkit.execution.layerwise import LayerwiseExecutor
from flapkit.execution.lightning.trainer import MODEL_PARALLEL
from flapkit.execution.resume import Resume, make_without_store
from flapkit.execution.runtime import Runtime
from flapkit.execution.shards import shard
from flapkit.execution.stream import Forms, LayerStream, layers_of, verify
from flapkit.execution.whole import WholeExecutor
from flapkit.model.adapter import ArchitectureAdapter
from flapkit.pruning.collector import needs_gradient
from flapkit.pruning.components import TrialSearcher
from flapkit.recipe.load import LoadedRecipe
from flapkit.recipe.schema import Recipe, TrainerSection
from flapkit.run.target import Target, find_target
from flapkit.system.errors import RecipeError
from flapkit.system.processes import broadcast_from_rank0
from flapkit.system.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_runtime(asked: TrainerSection, progress: Progress | None = None) -> Runtime:
    """Take over what a recipe says of the trainer; what it leaves open is Lightning's to choose.

    Raises:
        RecipeError: a device that this machine does not have, or another number of processes than were started.
    """
    options = asked.model_dump(exclude={"logger"})
    runtime = Runtime({name: value for name, value in options.items() if value is not None}, progress or Progress())
    runtime.check_processes()
    return runtime


def open_executor(
    recipe: LoadedRecipe,
    target: Target,
    text: CalibrationText,
    runtime: Runtime,
    folder: Path,
    *,
    cache: Path | None = None,
    resume: Resume = make_without_store,
) -> Executor:
    """Load a recipe's model to be pruned, or open it to be run layer by layer.

    Args:
        recipe: what to do.
        target: what it prunes.
        text: the calibration text.
        runtime: what it runs on.
        folder: the work folder, for layers that are finished.
        cache: folder of cached statistics; None for none.
        resume: reads what an interrupted run has finished, and stores what this one finishes.

    Raises:
        RecipeError: something that needs the whole model.
        ModelError: the model is missing or damaged, or cannot be run layer by layer.
    """
    asked, memory = recipe.recipe, recipe.recipe.calibration.statistics_bytes
    forms = check_execution(recipe, target)
    if forms is None:
        runtime.init_processes()
        model = load(asked.model.path, asked.model.dtype, revision=asked.model.revision)
        target.adapter.confirm(model, target.sites)
        return WholeExecutor(model, target.sites, text, runtime, memory=memory, cache=cache, resume=resume)
    if runtime.sharded:
        # Sharding is for what comes after: here each process streams its share of the windows.
        runtime = Runtime({**runtime.options, "strategy": "ddp"}, runtime.progress)
    runtime.init_processes()
    on_disk = asked.execution.hidden_states == "disk"
    stream = open_stream(asked, target, runtime, forms)
    return LayerwiseExecutor(
        stream, target.sites, text, runtime, folder, memory=memory, hidden_on_disk=on_disk, resume=resume
    )


def check_execution(recipe: LoadedRecipe, target: Target) -> Forms | None:
    """Refuse what the recipe's way to hold the weights does not allow, and try a tiny model of the target's kind.

    Returns:
        In what form the layers return their hidden states, if they run one at a time; None where the model is whole.

    Raises:
        RecipeError: something that needs the whole model.
        ModelError: models of this type cannot be run layer by layer.
    """
    asked, method = recipe.recipe, recipe.method
    if asked.execution.mode != "layerwise":
        if asked.trainer.strategy == MODEL_PARALLEL:
            raise RecipeError(
                f"{recipe.path}: trainer.strategy: model_parallel shards evaluation and recovery; to prune a model "
                "that no device holds, add `execution: layerwise`"
            )
        return None
    precision = asked.trainer.precision or ""
    refused = {
        f"metric {method.metric.name!r} needs gradients of the whole model; choose another, such as wifv": (
            needs_gradient(method.statistics)
        ),
        "evaluate.zero_shot and samples need the whole model; leave them out, and call `flapkit evaluate` afterwards": (
            asked.evaluate.zero_shot is not None or asked.evaluate.samples is not None
        ),
        f"searcher {method.searcher.name!r} tries plans on the whole model; choose another": (
            isinstance(method.searcher, TrialSearcher)
        ),
        "exports are compared with the whole model; leave them out, and call `flapkit export` afterwards": (
            bool(recipe.exporters)
        ),
        f"adapter {target.adapter.name!r} is confirmed on the whole model; give a declaration of its own": (
            type(target.adapter).confirm is not ArchitectureAdapter.confirm
        ),
        f"trainer.precision: {precision} is for the whole model; set model.dtype instead": precision.endswith("-true")
        and precision != "32-true",
    }
    for why, is_refused in refused.items():
        if is_refused:
            raise RecipeError(f"{recipe.path}: execution: layerwise: {why}")
    # Where processes have met already, transformers lets the first alone save the tiny model.
    return broadcast_from_rank0(lambda: verify(target.config, layers_of(target.sites)))


def open_stream(
    asked: Recipe, target: Target, runtime: Runtime, forms: Forms | None = None, weights: Weights | None = None
) -> LayerStream:
    """Build a recipe's model without its layers, which are read when their turn comes.

    Args:
        asked: names the model, and the type of its weights.
        target: its configuration and sites.
        runtime: what it runs on.
        forms: what a trial has shown of the layers; None where none of them runs alone.
        weights: the model's; by default those that the recipe names.

    Raises:
        ModelError: the model is missing or damaged.
    """
    dtype: Any = target.config.dtype if asked.model.dtype == "auto" else getattr(torch, asked.model.dtype)
    weights = weights or open_weights(asked.model.path, revision=asked.model.revision)
    return LayerStream(target.config, weights, layers_of(target.sites), dtype, runtime.device, runtime.precision, forms)


def load_model(recipe: LoadedRecipe, runtime: Runtime) -> PreTrainedModel:
    """Load the model that a recipe names: whole, or where its strategy shards models into each process its part.

    Args:
        recipe: names the model, and its type.
        runtime: what it will run on.

    Raises:
        ModelError: the model is missing or damaged.
        RecipeError: zero-shot tasks of which each process would find a batch size for itself.
    """
    asked = recipe.recipe
    if not runtime.sharded:
        return load(asked.model.path, asked.model.dtype, revision=asked.model.revision)
    check_batch_size(recipe)
    runtime.init_processes()
    return shard(open_stream(asked, find_target(replace(recipe, exporters=())), runtime))


def check_batch_size(recipe: LoadedRecipe) -> None:
    """Refuse a batch size that each process would find for itself: with different ones they wait for each other."""
    tasks = recipe.recipe.evaluate.zero_shot
    if tasks is not None and tasks.batch_size == "auto":
        raise RecipeError(
            f"{recipe.path}: trainer.strategy: model_parallel: evaluate.zero_shot.batch_size has to be the same in "
            "every process; set a number"
        )
