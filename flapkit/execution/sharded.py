"""The stages of a run whose model is sharded over its processes: each holds a part of every weight.

Forward passes, in calibration and evaluation, run under Lightning's ``ModelParallelStrategy``. What needs whole weights
goes a decoder layer at a time: scores in the sharded model, which gathers the layer; corrections and slices as in
``flapkit.execution.layerwise``, which reads the dense layers from the checkpoint and writes the pruned ones. The pruned
model is then sharded anew.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from flapkit.checkpoint.load import load
from flapkit.execution.layerwise import (
    Calibrated,
    Layers,
    judged,
    open_stream,
    prune_layers,
    read_calibrated,
    records_of,
    refuse,
    statistics_of,
)
from flapkit.execution.resume import checksummed, write_record
from flapkit.execution.runtime import Measured, Runtime, calibrate, evaluate
from flapkit.execution.shards import gathered, shard
from flapkit.execution.stream import Forms, layers_of
from flapkit.model.plan import Budget
from flapkit.model.site import Site
from flapkit.pruning.collector import Statistics, measure
from flapkit.pruning.method import Pruned
from flapkit.pruning.passes import split_by_memory
from flapkit.pruning.site_errors import SiteError, Trace
from flapkit.recipe import LoadedRecipe
from flapkit.run.target import Target, find_target
from flapkit.run.text import EvaluationText, RunText
from flapkit.system.errors import RecipeError
from flapkit.system.processes import broadcast_from_rank0


@dataclass(slots=True)
class Sharded:
    """A run's model, sharded over the processes; ``flapkit.execution.whole.Whole`` has the same methods.

    Args:
        recipe: what to do.
        target: what it prunes.
        model: the model, dense and later pruned.
        runtime: what it runs on, and whom it tells how far it is.
        work: folder for what is finished.
        forms: what a trial has shown of the layers.
        shards: the files that hold the pruned weights already.
    """

    recipe: LoadedRecipe
    target: Target
    model: PreTrainedModel
    runtime: Runtime
    work: Path
    forms: Forms
    shards: Sequence[Path] = ()

    def evaluate(self, texts: Mapping[str, EvaluationText], name: str) -> dict[str, Measured]:
        """Measure the perplexity of each text; ``name`` is what the stage is called."""
        return evaluate(self.model, texts, self.runtime, name)

    def see(self, trace: Trace | None) -> None:
        """Keep what the dense model's consumers see and give."""
        if trace is not None:
            with self.runtime.progress.stage("trace dense"):
                measured = measure(self.model, self.target.sites, [trace.statistic], trace.batches)
                for sites in _gathered(self.model, self.target.sites):
                    trace.see(self.model, {site.name: measured[site.name] for site in sites})

    def prune(self, budget: Budget, text: RunText) -> tuple[Statistics, Pruned]:
        """Calibrate and prune; return the statistics that are still in memory, and what was decided."""
        memory = self.recipe.recipe.calibration.statistics_bytes
        calibrated = calibrate_sharded(self, text, memory)
        layers = Layers(
            self.recipe,
            open_stream(self.recipe, self.target, self.runtime, self.forms),
            self.target.sites,
            self.runtime,
            self.work,
        )
        # What was dense gives its memory back before the layers are read; trainers refer to it in circles.
        self.model = layers.model
        gc.collect()
        pruned = prune_layers(layers, budget, text, calibrated, memory)
        self.shards = layers.shards
        self.model = shard(layers.stream)
        return calibrated.statistics, pruned

    def compare(self, trace: Trace | None, pruned: Pruned) -> Mapping[str, SiteError]:
        """Measure how far the output of each pruned site is from the dense one."""
        errors: dict[str, SiteError] = {}
        if trace is not None:
            with self.runtime.progress.stage("site errors"):
                left = trace.left(pruned.plan, self.target.sites)
                measured = measure(self.model, left, [trace.statistic], trace.batches)
                for sites in _gathered(self.model, left):
                    part = {site.name: measured[site.name] for site in sites}
                    errors |= trace.compare(self.model, part, pruned.plan, pruned.expected)
        return errors


def check_sharded(recipe: LoadedRecipe, target: Target) -> Forms:
    """Refuse what needs the whole model in one process, and try a tiny model of the target's kind.

    Returns:
        What the trial has shown of the layers.

    Raises:
        RecipeError: something that needs the whole model.
        ModelError: models of this type cannot be run layer by layer.
    """
    check_batch_size(recipe)
    return refuse(recipe, target, "trainer.strategy: model_parallel", {})


def check_batch_size(recipe: LoadedRecipe) -> None:
    """Refuse a batch size that each process would find for itself: with different ones they wait for each other."""
    tasks = recipe.recipe.evaluate.zero_shot
    if tasks is not None and tasks.batch_size == "auto":
        raise RecipeError(
            f"{recipe.path}: trainer.strategy: model_parallel: evaluate.zero_shot.batch_size has to be the same in "
            "every process; set a number"
        )


def open_sharded(recipe: LoadedRecipe, target: Target, runtime: Runtime, work: Path) -> Sharded:
    """Load a recipe's model into all processes, each its part.

    Args:
        recipe: what to do.
        target: what it prunes.
        runtime: what it runs on.
        work: folder for what is finished.

    Raises:
        RecipeError: something that needs the whole model.
        ModelError: the model is missing or damaged, or cannot be run layer by layer.
    """
    forms = check_sharded(recipe, target)
    runtime.init_processes()
    return Sharded(recipe, target, shard(open_stream(recipe, target, runtime, forms)), runtime, work, forms)


def load_model(recipe: LoadedRecipe, runtime: Runtime) -> PreTrainedModel:
    """Load the model that a recipe names: whole, or where its strategy shards models into each process its part.

    Args:
        recipe: names the model, and its type.
        runtime: what it will run on.

    Raises:
        ModelError: the model is missing or damaged.
        RecipeError: zero-shot tasks of which each process would find a batch size for itself.
    """
    asked = recipe.recipe.model
    if not runtime.sharded:
        return load(asked.path, asked.dtype, revision=asked.revision)
    check_batch_size(recipe)
    runtime.init_processes()
    return shard(open_stream(recipe, find_target(replace(recipe, exporters=())), runtime))


def _layers(model: PreTrainedModel, sites: Sequence[Site]) -> list[nn.Module]:
    return list(model.get_submodule(layers_of(sites)).children())


def _gathered(model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Gather each decoder layer in which some sites are, and yield those of its sites."""
    layers = _layers(model, sites)
    for index, of_layer in groupby(sites, lambda site: site.layer):
        with gathered(layers[index]):
            yield list(of_layer)


def calibrate_sharded(sharded: Sharded, text: RunText, memory: int) -> Calibrated:
    """Measure and score: as many sites in one pass over the text as fit; what is found is written as it comes.

    Args:
        sharded: the dense model.
        text: the calibration text.
        memory: bytes of statistics at a time.

    Raises:
        CalibrationError: an input that is not finite.
    """
    model, sites, runtime, method = sharded.model, sharded.target.sites, sharded.runtime, sharded.recipe.method
    kept, needed = statistics_of(method, sites, memory)
    files = records_of(sharded.work, len(_layers(model, sites)))
    left = broadcast_from_rank0(lambda: [site for site in sites if not files[site.layer].is_file()])
    found: dict[str, Tensor] = {}
    for part in split_by_memory(left, needed, memory):
        measured = calibrate(model, part, needed, text, runtime)
        for of_layer in _gathered(model, part):
            found |= judged(model, of_layer, {site.name: measured[site.name] for site in of_layer}, method, kept)
            if of_layer[-1] == [site for site in left if site.layer == of_layer[0].layer][-1]:
                broadcast_from_rank0(partial(write_record, files[of_layer[0].layer], found, checksummed(found, {})))
                found = {}
    return read_calibrated(sites, files, kept, runtime.device)
