"""The executor that holds one decoder layer in memory at a time.

A layer's weights are read once in calibration, once in pruning and once in every evaluation, regardless of the number
of windows. A pruned layer is written at once: there is one file of weights per layer, and one for the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from flapkit.checkpoint.weights import Weights, grouped, read_metadata, write_tensors
from flapkit.evaluation.perplexity import Perplexity, PerplexityValues, cross_entropy
from flapkit.evaluation.protocol import EvaluationText, MeasuredPerplexity
from flapkit.execution.executor import (
    CalibrationText,
    Correct,
    Executor,
    LearnedPlan,
    Repair,
    Score,
    Scores,
    check_judged,
    check_search_by_layers,
    digest_of,
    needed_for_search,
    sweep,
)
from flapkit.execution.layer_trials import LayerTrials, Supernet
from flapkit.execution.lightning.data import PruningData, held_out
from flapkit.execution.needs import Needs, Workload, supernet_size
from flapkit.execution.record_files import Record, write_record
from flapkit.execution.resume import Resume, make_without_store, read_finished
from flapkit.execution.runtime import Runtime
from flapkit.execution.stream import HiddenStates, LayerStream, step_all, walk
from flapkit.model.budget import Budget
from flapkit.model.classes import set_pruned_config_
from flapkit.model.history import add_plan_
from flapkit.model.plan import PruningPlan
from flapkit.model.precision import convert
from flapkit.model.site import Site, by_layer
from flapkit.model.surgery import Correction, slice_
from flapkit.pruning.algorithm import Method, Repairs
from flapkit.pruning.collector import Batch, Collector, Statistics
from flapkit.pruning.components import Compensator, Objective, TrainedSearcher
from flapkit.pruning.statistics import SiteStatistics, Statistic, size_of, split_by_memory
from flapkit.pruning.trials import held_out_windows
from flapkit.system.errors import RecipeError
from flapkit.system.float64 import float64_device
from flapkit.system.processes import broadcast_from_rank0, lost_processes, rank, window_share
from flapkit.system.workdir import check_space, damaged_as_output_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUPERNET = "supernet"
"""Name of the folder with a search's repaired consumers."""

NOTES = "notes"
EXPECTED = "expected"
"""Keys in the metadata of a layer's file, whose values are JSON; the names are those of ``Pruned``."""


class LayerwiseExecutor(Executor):
    """Holds one decoder layer of a model in memory at a time.

    Args:
        stream: the dense model; afterwards it reads the pruned layers.
        sites: the dense model's sites.
        text: the calibration text.
        runtime: the devices and the progress.
        folder: where finished layers are written, and hidden states if they are on the disk.
        memory: bytes of statistics at a time.
        hidden_on_disk: store the hidden states of all windows on the disk.
        resume: reads the repairs of layers that an interrupted sweep has finished, and stores those of this one.
        saved: dtype of the written layers; by default the model's.
    """

    def __init__(
        self,
        stream: LayerStream,
        sites: Sequence[Site],
        text: CalibrationText,
        runtime: Runtime,
        folder: Path,
        *,
        memory: float = 4e9,
        hidden_on_disk: bool = False,
        resume: Resume = make_without_store,
        saved: torch.dtype | None = None,
    ) -> None:
        self.model: PreTrainedModel = stream.model
        self.progress = runtime.progress
        self.sites = sites
        self._layers = by_layer(sites)
        self._stream = stream
        self._text = self._judging = text
        self._searches = False
        self._runtime = runtime
        self._folder = folder
        self._memory = memory
        self._hidden_on_disk = hidden_on_disk
        self._resume = resume
        self._saved = saved or self.model.dtype
        self._measured: Statistics | None = None

    @property
    def shards(self) -> list[Path]:
        """The files of the pruned model's weights: one per layer, and one for the weights outside the layers."""
        return shards_of(self._folder / "weights", len(self._stream))

    def score(self, score: Score, scoring: Sequence[type[Statistic]], repairing: Sequence[type[Statistic]]) -> Scores:
        """Measure and score layer by layer; each layer's measurements are written at once, for resumed runs.

        A search reads the statistics of a layer from its file when it repairs the layer.
        """
        stored = repairing if self._searches or size_of(repairing, self.sites) <= self._memory else ()
        needed = tuple(dict.fromkeys([*scoring, *stored]))
        batches, files = self._batches() if needed else [], self._measurements
        with lost_processes(), self._runtime.progress.stage("calibrate", len(files), "layers") as stage:
            for index, hidden in self._resumed("calibration", files, batches):
                tensors: dict[str, torch.Tensor] = {}
                for part, measured in self._measure(index, batches, hidden, needed):
                    tensors |= {f"{name}/scores": values for name, values in score(part, measured).items()}
                    tensors |= _tensors_of(measured, stored)
                broadcast_from_rank0(partial(write_record, files[index], Record(tensors)))
                stage.advance()
        read = (item for file in files for item in read_finished(file).tensors.items())
        records = grouped({name: tensor for name, tensor in read if not self._searches or name.endswith("/scores")})
        self._measured = None if self._searches else self._restore(self.sites, records, stored)
        return {site.name: records[site.name]["scores"] for site in self.sites if site.name in records}

    def for_search(self, method: Method) -> LayerwiseExecutor:
        """Return an executor of the same model that measures its statistics without the held-out windows.

        Raises:
            OutputError: the disk has no room for the statistics and the repaired consumers.
        """
        check_search_by_layers(method, self.sites, self._memory)
        text = self._text.fitted()
        check_judged(method, text)
        broadcast_from_rank0(lambda: self._check_disk(needed_for_search(method, sequential=True)))
        searching = LayerwiseExecutor(
            self._stream,
            self.sites,
            text,
            self._runtime,
            self._folder,
            memory=self._memory,
            hidden_on_disk=self._hidden_on_disk,
            resume=self._resume,
            saved=self._saved,
        )
        searching._judging = self._text
        searching._searches = True
        return searching

    def objective(
        self, kind: Literal["perplexity", "kl"], correct: Correct, repairing: Sequence[type[Statistic]]
    ) -> Objective:
        """Return the objective of trial searchers: sweeps over the layers with the held-out windows."""
        if broadcast_from_rank0(lambda: _count_finished(self._measurements)) < len(self._measurements):
            # The searcher uses no scores, so that nothing is measured yet.
            self.score(lambda *_: {}, (), repairing)
        known: dict[int, Statistics] = {}

        def correct_(sites: Sequence[Site], plan: PruningPlan) -> Mapping[str, Correction]:
            layer = sites[0].layer
            if layer not in known:
                known.clear()
                read = grouped(read_finished(self._measurements[layer]).tensors)
                known[layer] = self._restore(self._in_layer(layer), read, repairing)
            return correct(sites, known[layer], plan)

        limit = supernet_size(self.sites, self.model.dtype.itemsize)
        supernet = Supernet(self._folder / SUPERNET, limit, correct_)
        # All processes must find the same plan, so each uses the windows of all.
        windows = held_out_windows(self._judging.batches())
        trials = LayerTrials(self._stream, self.sites, kind, windows, supernet, self._hidden)

        def tried(plans: Sequence[PruningPlan], share: float = 1.0) -> list[float]:
            def make() -> Record:
                return Record({"values": torch.tensor(trials(plans, share), dtype=torch.float64)})

            values: list[float] = self._resume(f"trials {digest_of(plans)} {share:g}", make).tensors["values"].tolist()
            return values

        return tried

    def plans_together(self, share: float) -> int:
        """Return how many plans share a sweep: their hidden states are as many as those of the calibration text."""
        windows = len(self._judging)
        judging = math.ceil(share * int(held_out(windows).sum()))
        processes = (window_share() or {"num_replicas": 1})["num_replicas"]
        return max(1, windows // (max(1, judging) * processes))

    def learn(self, searcher: TrainedSearcher, sites: Sequence[Site], scores: Scores, budget: Budget) -> LearnedPlan:
        """Refuse: gates are trained on a whole model."""
        raise RecipeError("execution: layerwise: the searcher trains gates on the whole model; choose another")

    def repair_(self, plan: PruningPlan, repair: Repair, repairing: Sequence[type[Statistic]]) -> Repairs:
        """Repair and slice layer by layer.

        If repairs need statistics that are not in memory, the calibration text runs through the dense layers once more.
        """
        measured, repairing = self._measured, tuple(repairing)
        again = measured is None or any(not set(repairing) <= set(statistics) for statistics in measured.values())
        batches = self._batches() if again and repairing else []
        shards = self.shards
        finished = range(broadcast_from_rank0(lambda: _count_finished(shards[:-1])))
        with lost_processes(), self._runtime.progress.stage("prune", len(self._stream), "layers") as stage:
            for index, hidden in self._resumed("repair", shards[:-1], batches):
                repairs, known = Repairs(), [(self._in_layer(index), measured or {})]
                for part, statistics in self._measure(index, batches, hidden, repairing) if again else known:
                    repairs = repairs.merged(repair(part, statistics))
                self._slice_and_write(index, plan, repairs)
                stage.advance()
        return self._finish(plan, finished)

    def repair_in_sequence_(self, plan: PruningPlan, compensators: Sequence[Compensator]) -> Repairs:
        """Repair and slice in one sweep over the layers."""
        stream, batches = self._stream, self._batches()

        def hidden(name: str) -> HiddenStates:
            return self._hidden(f"sweep-{name}")

        with lost_processes(), self._runtime.progress.stage("prune", len(stream), "layers") as stage:
            for index, repairs in sweep(stream, self.sites, plan, compensators, batches, hidden, self._resume):
                self._slice_and_write(index, plan, repairs)
                stage.advance()
        return self._finish(plan, range(0))

    def observe(
        self, sites: Sequence[Site], statistic: type[Statistic], batches: Sequence[Batch]
    ) -> Iterator[Statistics]:
        """Measure one statistic layer by layer."""
        stream, hidden, layers = self._stream, self._hidden("observe"), by_layer(sites)
        for index in walk(stream, hidden):
            with Collector(stream.model, layers.get(index, []), [statistic]) as collector:
                step_all(stream, index, batches, hidden, collector)
            yield collector.statistics
        hidden.clear()

    def evaluate(self, texts: Mapping[str, EvaluationText], name: str) -> dict[str, MeasuredPerplexity]:
        """Measure the perplexity of all texts, in one pass over the layers."""
        with lost_processes():
            return self._runtime.measure_texts(self.model, texts, name, lambda sizes: self._test(texts, sizes, name))

    @classmethod
    def needs(cls, workload: Workload) -> Needs:
        """Return the needs of one layer at a time: the dense layer and the pruned one are in memory together."""
        outer, largest = workload.layers
        memory = outer + 2 * largest + max(workload.statistics, workload.layer_statistics) + workload.working
        disk = workload.written_weights + workload.search_files
        if workload.hidden_on_disk:
            return Needs(memory, memory, disk + 2 * workload.hidden)
        memory += workload.hidden // workload.processes
        return Needs(memory, memory, disk)

    def _test(
        self, texts: Mapping[str, EvaluationText], sizes: Mapping[str, int], name: str
    ) -> dict[str, PerplexityValues]:
        windows = {text: evaluation.windows for text, evaluation in texts.items()}
        data = PruningData(evaluations=windows, evaluation_batch_size=sizes, share=window_share())
        loaders = zip(texts, data.test_dataloader(), strict=True)
        batches = [(text, batch) for text, loader in loaders for batch in loader]
        stream, hidden, device = self._stream, self._hidden("evaluation"), self._runtime.device
        with self._runtime.progress.stage(name, len(stream), "layers") as stage:
            for index in walk(stream, hidden):
                step_all(stream, index, [batch for _, batch in batches], hidden)
                stage.advance()
            metrics = {text: Perplexity().to(float64_device(device)) for text in texts}
            for number, (text, batch) in enumerate(batches):
                logits = stream.logits(batch, hidden[number])
                metrics[text].update(*cross_entropy(logits, batch["labels"].to(device)))
                metrics[text].check(text)
        hidden.clear()
        return {text: metric.compute() for text, metric in metrics.items()}

    @property
    def _measurements(self) -> list[Path]:
        """The files of the layers' scores and statistics."""
        return [self._folder / "calibration" / f"{index:05}.safetensors" for index in range(len(self._stream))]

    def _check_disk(self, statistics: Sequence[type[Statistic]]) -> None:
        """Refuse a search whose files do not fit on the disk; those of an interrupted run are there already."""
        needed = size_of(tuple(statistics), self.sites) + supernet_size(self.sites, self.model.dtype.itemsize)
        written = [file for name in ("calibration", SUPERNET) for file in (self._folder / name).glob("*.safetensors")]
        check_space(self._folder, needed - sum(file.stat().st_size for file in written))

    def _batches(self) -> list[Batch]:
        return self._text.batches(window_share())

    def _in_layer(self, index: int) -> list[Site]:
        return self._layers.get(index, [])

    def _hidden(self, name: str, layers: int = 0) -> HiddenStates:
        """Return the store of hidden states of one pass over the layers.

        Args:
            name: name of the pass.
            layers: how many layers an interrupted run finished; if its hidden states are lost, the pass starts over.
        """
        return HiddenStates(self._folder / "hidden" / f"{name}-{rank()}" if self._hidden_on_disk else None, layers)

    def _write(self, path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Write a file of the pruned model's weights in the first process; the others wait."""
        broadcast_from_rank0(lambda: write_tensors(path, dict(convert(self.model, tensors, self._saved)), metadata))

    def _measure(
        self, index: int, batches: Sequence[Batch], hidden: HiddenStates, statistics: Sequence[type[Statistic]]
    ) -> Iterator[tuple[list[Site], Statistics]]:
        """Measure a loaded layer, a few sites at a time within the memory for statistics; store its output."""
        parts = split_by_memory(self._in_layer(index), statistics, self._memory) or [[]]
        for part in parts:
            with Collector(self._stream.model, part, statistics) as collector:
                step_all(self._stream, index, batches, hidden, collector, store=part is parts[-1])
                collector.merge()
            yield part, collector.statistics

    def _resumed(
        self, name: str, files: Sequence[Path], batches: Sequence[Batch]
    ) -> Iterator[tuple[int, HiddenStates]]:
        """Load each layer that has no file yet, yield it with its input, and free its memory afterwards.

        If the hidden states of an interrupted run are not on the disk, the batches run through the finished layers
        again.
        """
        done = broadcast_from_rank0(lambda: _count_finished(files))
        if done == len(files):
            return
        hidden = self._hidden(name, done)
        for index in walk(self._stream, hidden, None if batches else done):
            if index < done:
                step_all(self._stream, index, batches, hidden)
            else:
                yield index, hidden
        hidden.clear()

    def _restore(
        self,
        sites: Sequence[Site],
        records: Mapping[str, Mapping[str, torch.Tensor]],
        stored: Sequence[type[Statistic]],
    ) -> dict[str, SiteStatistics]:
        device = float64_device(self._runtime.device)
        return {
            site.name: SiteStatistics(
                statistic.restored(site, records[f"{site.name}/{_key(statistic)}"]).to(device) for statistic in stored
            )
            for site in sites
        }

    def _slice_and_write(self, index: int, plan: PruningPlan, repairs: Repairs) -> None:
        """Slice a loaded layer, and write it."""
        self._slice_(index, plan, repairs.corrections)
        metadata = {"format": "pt", NOTES: json.dumps(repairs.notes), EXPECTED: json.dumps(dict(repairs.expected))}
        self._write(self.shards[index], self._stream.tensors_of(index), metadata)

    def _slice_(self, index: int, plan: PruningPlan, corrections: Mapping[str, Correction]) -> None:
        sites = self._in_layer(index)
        slice_(self.model, sites, plan.only(sites), corrections)

    def _finish(self, plan: PruningPlan, finished: Sequence[int]) -> Repairs:
        """Write the weights outside the layers, and read the pruned model from now on.

        Args:
            plan: the units to keep.
            finished: layers that an interrupted run has written.
        """
        shards = self.shards
        self._write(shards[-1], self._stream.tensors_of(None), {"format": "pt"})
        written = Weights.of(shards)
        for index in finished:
            # Give the layer the shapes and the biases that it has in its file.
            biased = (site for site in self._in_layer(index) if site.kind != "mixture" and site.bias in written)
            empty = {site.name: Correction(bias=torch.zeros(site.out_features, device="meta")) for site in biased}
            self._slice_(index, plan, empty)
        add_plan_(self.model, self.sites, plan)
        set_pruned_config_(self.model, self.sites)
        self._stream.read_from(written)
        notes = {name: Correction(note=note) for name, note in _gathered(shards, NOTES).items()}
        return Repairs(notes, _gathered(shards, EXPECTED))


def shards_of(folder: Path, layers: int) -> list[Path]:
    """Name the files of a model's weights: one per layer, and one for the weights outside the layers."""
    count = layers + 1
    return [folder / f"model-{index + 1:05}-of-{count:05}.safetensors" for index in range(count)]


def _count_finished(files: Sequence[Path]) -> int:
    """Count the layers, from the first, whose files exist.

    Raises:
        OutputError: one of the files is damaged.
    """
    for index, file in enumerate(files):
        if not file.is_file():
            return index
        with damaged_as_output_error(file):
            read_metadata(file)
    return len(files)


def _gathered(files: Sequence[Path], key: str) -> dict[str, Any]:
    """Merge the JSON objects under a key of the files' metadata."""
    values: dict[str, Any] = {}
    for file in files:
        with damaged_as_output_error(file):
            values |= json.loads(read_metadata(file).get(key, "{}"))
    return values


def _tensors_of(measured: Statistics, stored: Sequence[type[Statistic]]) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{_key(statistic)}/{part}": tensor
        for name, statistics in measured.items()
        for statistic in stored
        for part, tensor in statistics[statistic].state.items()
    }


def _key(statistic: type[Statistic]) -> str:
    return f"{statistic.__module__}.{statistic.__qualname__}"
