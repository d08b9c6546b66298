"""The stages of a run whose model is never whole in memory: each goes through the decoder layers one at a time.

A layer's weights are read once in calibration, once in pruning and once in each evaluation, however many windows there
are. Pruned layers are written as they are made: the weights lie in a file for each layer, and one for the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flapkit.checkpoint.load import open_weights
from flapkit.checkpoint.weights import Weights, grouped, read_metadata
from flapkit.evaluation.perplexity import Perplexity, PerplexityValues, cross_entropy
from flapkit.execution.lightning.data import PruningData
from flapkit.execution.lightning.trainer import MODEL_PARALLEL
from flapkit.execution.resume import checksummed, read_checksummed, write_record
from flapkit.execution.runtime import Measured, Runtime, calibration_data, measure_texts
from flapkit.execution.stream import Forms, HiddenStates, LayerStream, layers_of, step_all, verify, walk
from flapkit.model.adapter import ArchitectureAdapter
from flapkit.model.classes import describe_
from flapkit.model.plan import Budget, PruningPlan
from flapkit.model.site import Site
from flapkit.model.surgery import Correction, slice_
from flapkit.pruning.collector import Batch, Collector, Statistics, needs_gradient
from flapkit.pruning.components import TrialSearcher, needed_statistics
from flapkit.pruning.method import Method, Pruned, expect_errors, find_corrections, find_plan, notes_of, score_sites
from flapkit.pruning.passes import size_of, split_by_memory
from flapkit.pruning.site_errors import SiteError, Trace
from flapkit.pruning.statistics import SiteStatistics, Statistic
from flapkit.recipe import LoadedRecipe
from flapkit.run.target import Target
from flapkit.run.text import EvaluationText, RunText
from flapkit.system.errors import RecipeError
from flapkit.system.processes import broadcast_from_rank0, lost_processes, rank, share
from flapkit.system.workdir import damaged_as_output_error

NOTES = "notes"
EXPECTED = "expected"
"""What a layer's file says of its sites, as JSON: see ``Pruned``."""


@dataclass(frozen=True, slots=True)
class Layers:
    """A run's model, one decoder layer in memory at a time; ``flapkit.execution.whole.Whole`` has the same methods.

    Args:
        recipe: what to do.
        stream: the model.
        sites: the dense model's sites.
        runtime: what it runs on, and whom it tells how far it is.
        work: folder for what is finished, and for hidden states where they live on the disk.
    """

    recipe: LoadedRecipe
    stream: LayerStream
    sites: Sequence[Site]
    runtime: Runtime
    work: Path

    @property
    def model(self) -> PreTrainedModel:
        """The model, its layers without memory."""
        return self.stream.model

    def evaluate(self, texts: Mapping[str, EvaluationText], name: str) -> dict[str, Measured]:
        """Measure the perplexity of each text; ``name`` is what the stage is called."""
        return evaluate_layers(self, texts, name)

    def see(self, trace: Trace | None) -> None:
        """Keep what the dense layers' consumers see and give."""
        if trace is not None:
            for part in _visit(self, "trace dense", self.sites, trace):
                trace.see(self.model, part)

    def prune(self, budget: Budget, text: RunText) -> tuple[Statistics, Pruned]:
        """Calibrate and prune; return the statistics that are still in memory, and what was decided."""
        memory = self.recipe.recipe.calibration.statistics_bytes
        with lost_processes():
            calibrated = calibrate_layers(self, text, memory)
            return calibrated.statistics, prune_layers(self, budget, text, calibrated, memory)

    def compare(self, trace: Trace | None, pruned: Pruned) -> Mapping[str, SiteError]:
        """Measure how far the output of each pruned site is from the dense one."""
        errors: dict[str, SiteError] = {}
        if trace is not None:
            for part in _visit(self, "site errors", trace.left(pruned.plan, self.sites), trace):
                errors |= trace.compare(self.model, part, pruned.plan, pruned.expected)
        return errors

    def of(self, layer: int) -> list[Site]:
        """List the sites of a layer."""
        return [site for site in self.sites if site.layer == layer]

    def hidden(self, name: str, layers: int = 0) -> HiddenStates:
        """Return what the batches of one pass over the layers are at.

        Args:
            name: of the pass.
            layers: how many layers a stopped run went through; where its hidden states are gone, the pass begins anew.
        """
        on_disk = self.recipe.recipe.execution.hidden_states == "disk"
        return HiddenStates(self.work / "hidden" / f"{name}-{rank()}" if on_disk else None, layers)

    def write(self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a file of the work folder: the first process for all, which wait until it is there."""
        broadcast_from_rank0(lambda: write_record(path, tensors, metadata))

    @property
    def records(self) -> list[Path]:
        """The files that hold what was measured, one for each layer."""
        return records_of(self.work, len(self.stream))

    @property
    def shards(self) -> list[Path]:
        """The files of the pruned model's weights: one for each layer, and one for what stands outside the layers."""
        return shards_of(self.work / "weights", len(self.stream))


def shards_of(folder: Path, layers: int) -> list[Path]:
    """Name the files of a model's weights: one for each layer, and one for what stands outside the layers."""
    count = layers + 1
    return [folder / f"model-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]


def records_of(work: Path, layers: int) -> list[Path]:
    """Name the files that hold what was measured, one for each layer."""
    return [work / "calibration" / f"{index:05}.safetensors" for index in range(layers)]


def check_layerwise(recipe: LoadedRecipe, target: Target) -> Forms:
    """Refuse what needs the whole model, and try a tiny model of the target's kind.

    Returns:
        What the trial has shown of the layers.

    Raises:
        RecipeError: something that needs the whole model.
        ModelError: models of this type cannot be run layer by layer.
    """
    asked, method = recipe.recipe, recipe.method
    refused = {
        f"metric {method.metric.name!r} needs gradients of the whole model; choose another, such as wifv": (
            needs_gradient(method.statistics)
        ),
        "evaluate.zero_shot and samples need the whole model; leave them out, and call `flapkit evaluate` afterwards": (
            asked.evaluate.zero_shot is not None or asked.evaluate.samples is not None
        ),
        "it does without trainer.strategy: model_parallel; set `ddp`": asked.trainer.strategy == MODEL_PARALLEL,
    }
    return refuse(recipe, target, "execution: layerwise", refused)


def refuse(recipe: LoadedRecipe, target: Target, mode: str, refused: Mapping[str, bool]) -> Forms:
    """Refuse what needs the whole model in one process, and try a tiny model of the target's kind.

    Args:
        recipe: what to do.
        target: what it prunes.
        mode: what in the recipe keeps the model from being whole.
        refused: why more is refused -> whether the recipe asks for it.

    Returns:
        What the trial has shown of the layers.

    Raises:
        RecipeError: something that needs the whole model.
        ModelError: models of this type cannot be run layer by layer.
    """
    asked, method = recipe.recipe, recipe.method
    precision = asked.trainer.precision or ""
    refused = {
        **refused,
        f"searcher {method.searcher.name!r} tries plans on the whole model; choose another": (
            isinstance(method.searcher, TrialSearcher)
        ),
        "calibration.sequential needs the whole model twice; leave it out": asked.calibration.sequential,
        "exports are compared with the whole model; leave them out, and call `flapkit export` afterwards": (
            bool(recipe.exporters)
        ),
        f"adapter {target.adapter.name!r} is confirmed on the whole model; give a declaration of its own": (
            type(target.adapter).confirm is not ArchitectureAdapter.confirm
        ),
        f"trainer.precision: {precision} is for the whole model; set model.dtype instead": precision.endswith("-true")
        and precision != "32-true",
    }
    for why, is_asked in refused.items():
        if is_asked:
            raise RecipeError(f"{recipe.path}: {mode}: {why}")
    path = layers_of(target.sites)
    # Where processes have met already, transformers lets the first alone save the tiny model.
    return broadcast_from_rank0(lambda: verify(target.config, path))


def open_layers(recipe: LoadedRecipe, target: Target, runtime: Runtime, work: Path) -> Layers:
    """Build a recipe's model without its layers.

    Args:
        recipe: what to do.
        target: what it prunes.
        runtime: what it runs on.
        work: folder for what is finished.

    Raises:
        RecipeError: something that needs the whole model.
        ModelError: the model is missing or damaged, or cannot be run layer by layer.
    """
    forms = check_layerwise(recipe, target)
    runtime.init_processes()
    return Layers(recipe, open_stream(recipe, target, runtime, forms), target.sites, runtime, work)


def open_stream(
    recipe: LoadedRecipe, target: Target, runtime: Runtime, forms: Forms | None = None, weights: Weights | None = None
) -> LayerStream:
    """Build a recipe's model without its layers, which are read when their turn comes.

    Args:
        recipe: what to do.
        target: what it prunes.
        runtime: what it runs on.
        forms: what a trial has shown of the layers; None where none of them runs alone.
        weights: the model's; by default those that the recipe names.

    Raises:
        ModelError: the model is missing or damaged.
    """
    asked = recipe.recipe
    dtype: Any = target.config.dtype if asked.model.dtype == "auto" else getattr(torch, asked.model.dtype)
    weights = weights or open_weights(asked.model.path, revision=asked.model.revision)
    layers = layers_of(target.sites)
    return LayerStream(target.config, weights, layers, dtype, runtime.device, runtime.precision, forms)


def evaluate_layers(layers: Layers, texts: Mapping[str, EvaluationText], name: str) -> dict[str, Measured]:
    """Measure the perplexity of each text, all of them in one pass over the layers.

    Args:
        layers: the model, dense or pruned.
        texts: name -> text.
        name: what the stage is called.

    Raises:
        RunError: a loss that is not finite, or a window that the device's memory does not hold.
    """
    model, runtime = layers.stream.model, layers.runtime
    with lost_processes():
        return measure_texts(model, texts, runtime, name, lambda sizes: _perplexities(layers, texts, sizes, name))


def _perplexities(
    layers: Layers, texts: Mapping[str, EvaluationText], sizes: Mapping[str, int], name: str
) -> dict[str, PerplexityValues]:
    windows = {name: text.windows for name, text in texts.items()}
    data = PruningData(evaluations=windows, evaluation_batch_size=sizes, share=share())
    batches = [(text, batch) for text, loader in zip(texts, data.test_dataloader(), strict=True) for batch in loader]
    stream, hidden = layers.stream, layers.hidden("evaluation")
    with layers.runtime.progress.stage(name, len(stream), "layers") as stage:
        for index in walk(stream, hidden):
            step_all(stream, index, [batch for _, batch in batches], hidden)
            stage.advance()
        device = layers.runtime.device
        metrics = {text: Perplexity().to(device) for text in texts}
        for number, (text, batch) in enumerate(batches):
            logits = stream.logits(batch, hidden[number])
            metrics[text].update(*cross_entropy(logits, batch["labels"].to(device)))
            metrics[text].check(text)
    hidden.clear()
    return {text: metric.compute() for text, metric in metrics.items()}


def _visit(layers: Layers, name: str, sites: Sequence[Site], trace: Trace) -> Iterator[Statistics]:
    """Run a trace's text through the layers, and yield what was measured at each while it is loaded."""
    stream, hidden = layers.stream, layers.hidden("trace")
    with layers.runtime.progress.stage(name, len(stream), "layers") as stage:
        for index in walk(stream, hidden):
            of_layer = [site for site in sites if site.layer == index]
            with Collector(stream.model, of_layer, [trace.statistic]) as collector:
                step_all(stream, index, trace.batches, hidden, collector)
            yield collector.statistics
            stage.advance()
    hidden.clear()


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration leaves.

    Args:
        scores: site name -> scores [units, k].
        statistics: site name -> what corrections need; without any where that does not fit in memory for all sites.
    """

    scores: Mapping[str, Tensor]
    statistics: Statistics


def calibrate_layers(layers: Layers, text: RunText, memory: int) -> Calibrated:
    """Measure and score layer by layer; what is found is written as it comes, and read by a run that is resumed.

    Args:
        layers: the dense model.
        text: the calibration text.
        memory: bytes of statistics at a time.

    Raises:
        CalibrationError: an input that is not finite.
    """
    method = layers.recipe.method
    kept, needed = statistics_of(method, layers.sites, memory)
    stream, batches, files = layers.stream, _batches(text) if needed else [], layers.records
    with layers.runtime.progress.stage("calibrate", len(stream), "layers") as stage:
        for index, hidden in _resumed(layers, "calibration", files, batches):
            found: dict[str, Tensor] = {}
            for part, measured in _measure(layers, index, batches, hidden, needed, memory):
                found |= judged(stream.model, part, measured, method, kept)
            layers.write(files[index], found, checksummed(found, {}))
            stage.advance()
    # Asked for once: Lightning builds a trainer to find it.
    return read_calibrated(layers.sites, files, kept, layers.runtime.device)


def statistics_of(
    method: Method, sites: Sequence[Site], memory: int
) -> tuple[Sequence[type[Statistic]], Sequence[type[Statistic]]]:
    """Choose what is measured in calibration.

    Args:
        method: the components.
        sites: the model's sites.
        memory: bytes of statistics at a time.

    Returns:
        What is kept for the corrections: nothing where that of all sites does not fit; and all that is measured.
    """
    repair = needed_statistics(method.compensators)
    kept = repair if size_of(repair, sites) <= memory else ()
    return kept, tuple(dict.fromkeys([*method.scoring, *kept]))


def judged(
    model: PreTrainedModel,
    sites: Sequence[Site],
    measured: Statistics,
    method: Method,
    kept: Sequence[type[Statistic]],
) -> dict[str, Tensor]:
    """Score some sites whose weights are in memory; return their scores and statistics, as a record holds them."""
    scores = score_sites(model, sites, measured, method.metric) if method.searcher.uses_scores else {}
    return {f"{name}/scores": score for name, score in scores.items()} | _saved(measured, kept)


def _measure(
    layers: Layers,
    index: int,
    batches: Sequence[Batch],
    hidden: HiddenStates,
    statistics: Sequence[type[Statistic]],
    memory: int,
) -> Iterator[tuple[list[Site], Statistics]]:
    """Measure a loaded layer, some sites at a time, so that their statistics fit in memory; then go on behind it."""
    parts = split_by_memory(layers.of(index), statistics, memory) or [[]]
    for part in parts:
        with Collector(layers.stream.model, part, statistics) as collector:
            step_all(layers.stream, index, batches, hidden, collector, keep=part is parts[-1])
            collector.merge()
        yield part, collector.statistics


def _resumed(
    layers: Layers, name: str, files: Sequence[Path], batches: Sequence[Batch]
) -> Iterator[tuple[int, HiddenStates]]:
    """Load each layer that has no file yet, with the batches before it, and give its memory back afterwards.

    Where the hidden states of a stopped run are not on the disk, the batches run through the finished layers once more.
    """
    stream, done = layers.stream, broadcast_from_rank0(lambda: _count_finished(files))
    if done == len(files):
        return
    hidden = layers.hidden(name, done)
    for index in walk(stream, hidden, None if batches else done):
        if index < done:
            step_all(stream, index, batches, hidden)
        else:
            yield index, hidden
    hidden.clear()


def _count_finished(files: Sequence[Path]) -> int:
    """Count the layers, from the first, that have their file already.

    Raises:
        OutputError: one of the files is damaged.
    """
    for index, file in enumerate(files):
        if not file.is_file():
            return index
        with damaged_as_output_error(file):
            read_metadata(file)
    return len(files)


def _saved(measured: Statistics, kept: Sequence[type[Statistic]]) -> dict[str, Tensor]:
    return {
        f"{name}/{_key(statistic)}/{part}": tensor
        for name, found in measured.items()
        for statistic in kept
        for part, tensor in found[statistic].saved().items()
    }


def _key(statistic: type[Statistic]) -> str:
    return f"{statistic.__module__}.{statistic.__qualname__}"


def read_calibrated(
    sites: Sequence[Site], files: Sequence[Path], kept: Sequence[type[Statistic]], device: torch.device
) -> Calibrated:
    """Read what calibration left, a file for each layer.

    Args:
        sites: the model's sites.
        files: the records.
        kept: the statistics that they hold.
        device: where corrections are computed.
    """
    tensors = grouped({name: tensor for file in files for name, tensor in read_checksummed(file)[0].items()})
    return Calibrated(
        {site.name: tensors[site.name]["scores"] for site in sites if site.name in tensors},
        {
            site.name: SiteStatistics(
                statistic.restored(site, tensors[f"{site.name}/{_key(statistic)}"]).to(device) for statistic in kept
            )
            for site in sites
        },
    )


def prune_layers(layers: Layers, budget: Budget, text: RunText, calibrated: Calibrated, memory: int) -> Pruned:
    """Find the plan, and write every layer as it leaves it; the model's layers keep the pruned shapes.

    Where corrections need more than calibration kept, the calibration text goes through the dense layers once more.

    Args:
        layers: the dense model; afterwards the pruned one, which reads what was written.
        budget: how much to remove.
        text: the calibration text.
        calibrated: what calibration left.
        memory: bytes of statistics at a time.
    """
    method = layers.recipe.method
    plan = find_plan(layers.sites, calibrated.scores, method.searcher, budget)
    repair = needed_statistics(method.compensators)
    again = any(not set(repair) <= set(found) for found in calibrated.statistics.values())
    stream, batches, files = layers.stream, _batches(text) if again else [], layers.shards
    finished = range(broadcast_from_rank0(lambda: _count_finished(files[:-1])))
    with layers.runtime.progress.stage("prune", len(stream), "layers") as stage:
        for index, hidden in _resumed(layers, "repair", files[:-1], batches):
            corrections: dict[str, Correction] = {}
            expected: dict[str, float | None] = {}
            known = [(layers.of(index), calibrated.statistics)]
            for part, measured in _measure(layers, index, batches, hidden, repair, memory) if again else known:
                found = find_corrections(stream.model, part, measured, method.compensators, plan)
                expected |= expect_errors(stream.model, part, measured, plan, found)
                corrections |= found
            _slice_layer_(layers, index, plan, corrections)
            metadata = {"format": "pt", NOTES: json.dumps(notes_of(corrections)), EXPECTED: json.dumps(expected)}
            layers.write(files[index], stream.tensors_of(index), metadata)
            stage.advance()
    layers.write(files[-1], stream.tensors_of(None), {"format": "pt"})
    written = Weights.of(files)
    for index in finished:
        _slice_empty_(layers, index, plan, written)
    describe_(stream.model, layers.sites)
    stream.read_from(written)
    return Pruned(calibrated.scores, plan, _said(files, NOTES), _said(files, EXPECTED))


def _slice_layer_(layers: Layers, index: int, plan: PruningPlan, corrections: Mapping[str, Correction]) -> None:
    sites = layers.of(index)
    slice_(layers.stream.model, sites, PruningPlan({site.name: plan.keep[site.name] for site in sites}), corrections)


def _slice_empty_(layers: Layers, index: int, plan: PruningPlan, written: Weights) -> None:
    """Give a layer that a stopped run has written the shapes, and the biases, that it has there."""
    sites = layers.of(index)
    biases = {
        site.name: Correction(bias=torch.zeros(site.out_features, device="meta"))
        for site in sites
        if site.bias in written
    }
    _slice_layer_(layers, index, plan, biases)


def _said(files: Sequence[Path], key: str) -> dict[str, Any]:
    """Gather what the layers' files say of their sites."""
    found: dict[str, Any] = {}
    for file in files:
        with damaged_as_output_error(file):
            found |= json.loads(read_metadata(file).get(key, "{}"))
    return found


def _batches(text: RunText) -> list[Batch]:
    return list(calibration_data(text, share()).predict_dataloader())
