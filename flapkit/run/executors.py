"""Open a recipe's model: whole, layer by layer, or sharded over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flapkit.checkpoint.load import load, load_config, open_weights, restore_plan_
from flapkit.checkpoint.weights import Weights
from flapkit.execution.executor import CalibrationText, Executor, check_search, check_search_by_layers
from flapkit.execution.layerwise import LayerwiseExecutor
from flapkit.execution.lightning.trainer import MODEL_PARALLEL
from flapkit.execution.resume import Resume, make_without_store
from flapkit.execution.runtime import Runtime
from flapkit.execution.shards import shard
from flapkit.execution.stream import Forms, LayerStream, layers_of, verify
from flapkit.execution.whole import WholeExecutor
from flapkit.model.adapter import ArchitectureAdapter
from flapkit.model.empty import sees
from flapkit.model.soundness import check_in_memory, check_plain
from flapkit.model.spread import check_accelerate, embeddings_device, is_spread
from flapkit.pruning.collector import needs_gradient
from flapkit.pruning.components import TrainedSearcher
from flapkit.pruning.gates import check_gated
from flapkit.recipe.load import LoadedRecipe
from flapkit.recipe.schema import Model, Recipe, TrainerSection
from flapkit.run.dtypes import choose_dtypes
from flapkit.run.target import Target, find_target
from flapkit.system.errors import RecipeError
from flapkit.system.processes import broadcast_from_rank0
from flapkit.system.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_runtime(settings: TrainerSection, progress: Progress | None = None) -> Runtime:
    """Build the runtime from a recipe's ``trainer`` section; Lightning chooses what the recipe does not set.

    Raises:
        RecipeError: this machine lacks the device, or the number of started processes differs.
    """
    options = settings.model_dump(exclude={"logger"})
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
    """Load a recipe's model for pruning, or open it to run layer by layer.

    Args:
        recipe: the recipe.
        target: the model's sites.
        text: the calibration text.
        runtime: what it runs on.
        folder: the work folder, for finished layers.
        cache: folder of cached statistics; None for no cache.
        resume: reads what an interrupted run has finished, and stores what this one finishes.

    Raises:
        RecipeError: the recipe needs the whole model, but runs layer by layer.
        ModelError: the model is missing or damaged, or cannot be run layer by layer.
    """
    settings, memory = recipe.recipe, recipe.recipe.calibration.statistics_bytes
    dtypes = choose_dtypes(settings.model, target.config, runtime.device)
    dtypes.tell()
    forms = check_execution(recipe, target)
    if forms is None:
        runtime.init_processes()
        model = load_whole(settings.model, dtypes.compute, runtime)
        check_plain(model)
        target.adapter.confirm(model, target.sites)
        saved = dtypes.saved
        return WholeExecutor(
            model, target.sites, text, runtime, memory=memory, cache=cache, resume=resume, saved=saved, folder=folder
        )
    if runtime.sharded:
        # A model is sharded for recovery and evaluation; here every process streams its share of the windows.
        runtime = Runtime({**runtime.options, "strategy": "ddp"}, runtime.progress)
    runtime.init_processes()
    on_disk = settings.execution.hidden_states == "disk"
    stream = open_stream(settings, target, runtime, forms)
    return LayerwiseExecutor(
        stream,
        target.sites,
        text,
        runtime,
        folder,
        memory=memory,
        hidden_on_disk=on_disk,
        resume=resume,
        saved=dtypes.saved,
    )


def check_execution(recipe: LoadedRecipe, target: Target) -> Forms | None:
    """Refuse what the recipe's ``execution`` does not allow; for layerwise execution, verify a tiny model.

    Returns:
        The form in which the layers return their hidden states; None with the whole model.

    Raises:
        RecipeError: the recipe needs the whole model, but runs layer by layer.
        ModelError: models of this type cannot be run layer by layer.
    """
    settings, method = recipe.recipe, recipe.method
    check_accelerate(settings.model.device_map)
    if settings.execution.mode != "layerwise":
        if settings.trainer.strategy == MODEL_PARALLEL:
            raise RecipeError(
                f"{recipe.path}: trainer.strategy: model_parallel shards only evaluation and recovery; to prune a "
                "model that does not fit on one device, add `execution: layerwise`"
            )
        if isinstance(method.searcher, TrainedSearcher):
            check_gated(target.sites)
        with _in_recipe(recipe):
            check_search(method, target.sites, settings.calibration.statistics_bytes)
        return None
    trainer = settings.trainer
    refused = {
        f"metric {method.metric.name!r} needs gradients of the whole model; choose another, such as wifv": (
            needs_gradient(method.statistics)
        ),
        "evaluate.zero_shot and samples need the whole model; leave them out, and call `flapkit evaluate` afterwards": (
            settings.evaluate.zero_shot is not None or settings.evaluate.samples is not None
        ),
        f"searcher {method.searcher.name!r} trains gates on the whole model; choose another": (
            isinstance(method.searcher, TrainedSearcher)
        ),
        f"models of type {target.config.model_type!r} have a vision tower beside their layers; leave `execution` out": (
            sees(target.config)
        ),
        "exports are compared with the whole model; leave them out, and call `flapkit export` afterwards": (
            bool(recipe.exporters)
        ),
        f"adapter {target.adapter.name!r} is verified on the whole model; use an adapter with a declaration": (
            type(target.adapter).confirm is not ArchitectureAdapter.confirm
        ),
        f"trainer.precision: {trainer.precision} is for the whole model; set model.dtype instead": (
            trainer.converts_weights
        ),
    }
    for reason, is_refused in refused.items():
        if is_refused:
            raise RecipeError(f"{recipe.path}: execution: layerwise: {reason}")
    with _in_recipe(recipe):
        check_search_by_layers(method, target.sites, settings.calibration.statistics_bytes)
    # Once the process group is initialised, transformers saves the tiny model only in the first process.
    return broadcast_from_rank0(lambda: verify(target.config, layers_of(target.sites)))


@contextmanager
def _in_recipe(recipe: LoadedRecipe) -> Iterator[None]:
    """Name the recipe in a ``RecipeError``."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{recipe.path}: {error}") from error


def open_stream(
    settings: Recipe, target: Target, runtime: Runtime, forms: Forms | None = None, weights: Weights | None = None
) -> LayerStream:
    """Build a recipe's model without its layers, which are loaded one at a time.

    Args:
        settings: the recipe's settings, of which the model and its dtype are used.
        target: its configuration and sites.
        runtime: what it runs on.
        forms: the forms of the layers' outputs, from ``check_execution``; None where no layer runs alone.
        weights: the model's weights; by default those of the recipe's model.

    Raises:
        ModelError: the model is missing or damaged.
    """
    dtype = choose_dtypes(settings.model, target.config, runtime.device).compute
    weights = weights or open_weights(settings.model.source, revision=settings.model.revision)
    layers, where = layers_of(target.sites), (runtime.device, runtime.precision)
    stream = LayerStream(target.config, weights, layers, dtype, *where, forms)
    restore_plan_(stream.model)
    return stream


def load_whole(settings: Model, dtype: torch.dtype, runtime: Runtime) -> PreTrainedModel:
    """Load a whole model, spread over several devices if its ``device_map`` says so.

    Args:
        settings: the recipe's model.
        dtype: the type that it computes in.
        runtime: what it will run on.

    Raises:
        ModelError: the model is missing or damaged, or its devices do not hold it.
        RecipeError: ``device_map`` puts all of it on another device than the trainer's.
    """
    model = load(settings.source, dtype, revision=settings.revision, device_map=settings.device_map)
    check_in_memory(model)
    device = embeddings_device(model)
    if settings.device_map is not None and not is_spread(model) and not _same(device, runtime.device):
        raise RecipeError(
            f"model.device_map puts the whole model on {device}, and trainer.accelerator is {runtime.device}; leave "
            "device_map out, and set trainer.accelerator"
        )
    return model


def _same(device: torch.device, other: torch.device) -> bool:
    return (device.type, device.index or 0) == (other.type, other.index or 0)


def load_model(recipe: LoadedRecipe, runtime: Runtime) -> PreTrainedModel:
    """Load a recipe's model: whole, or sharded over the processes if its strategy is ``model_parallel``.

    Args:
        recipe: the recipe, of which the model and its dtype are used.
        runtime: what it will run on.

    Raises:
        ModelError: the model is missing or damaged.
        RecipeError: the batch size of zero-shot tasks is ``auto``, with a sharded model.
    """
    settings = recipe.recipe
    if not runtime.sharded:
        config = load_config(settings.model.source, revision=settings.model.revision)
        dtype = choose_dtypes(settings.model, config, runtime.device).compute
        return load_whole(settings.model, dtype, runtime)
    check_batch_size(recipe)
    runtime.init_processes()
    return shard(open_stream(settings, find_target(replace(recipe, exporters=())), runtime))


def check_batch_size(recipe: LoadedRecipe) -> None:
    """Refuse ``batch_size: auto``: with different sizes the processes would wait for each other forever."""
    tasks = recipe.recipe.evaluate.zero_shot
    if tasks is not None and tasks.batch_size == "auto":
        raise RecipeError(
            f"{recipe.path}: trainer.strategy: model_parallel: evaluate.zero_shot.batch_size must be the same in every "
            "process; set a number"
        )
