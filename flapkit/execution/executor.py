"""The algorithm, once, and what it is written against: an executor, which holds a model's weights and runs them.

``WholeExecutor`` has the model in memory, ``LayerwiseExecutor`` one decoder layer at a time. Both measure, repair,
slice and evaluate; ``prune_`` puts these together, whatever holds the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from flapkit.evaluation.protocol import EvaluationText, MeasuredPerplexity
from flapkit.execution.lightning.data import PruningData
from flapkit.execution.needs import Needs, Workload
from flapkit.execution.records import Record
from flapkit.execution.resume import Keep, make_without_store
from flapkit.model.plan import Budget, PruningPlan
from flapkit.model.site import Site
from flapkit.model.surgery import Correction
from flapkit.pruning.collector import Batch, Statistics
from flapkit.pruning.components import Compensator, Objective, TrialSearcher
from flapkit.pruning.method import Method, Pruned, Repairs, find_corrections, find_plan, repair_sites, score_sites
from flapkit.pruning.sequential import Hidden, LayerRepair, Runner, copy_layer
from flapkit.pruning.statistics import Statistic
from flapkit.system.progress import Progress

Scores = Mapping[str, Tensor]
"""Site name -> scores [units, k], float64 on the CPU."""

Score = Callable[[Sequence[Site], Statistics], Scores]
"""Scores some sites, whose weights are in memory, from what was measured there: site name -> scores [units, k]."""

Repair = Callable[[Sequence[Site], Statistics], Repairs]
"""Computes the corrections of some sites, whose weights are in memory, from what was measured there."""

Correct = Callable[[Sequence[Site], Statistics, PruningPlan], Mapping[str, Correction]]
"""Computes the corrections of some sites for a plan: site name -> correction."""


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """The text that statistics are measured on.

    Args:
        windows: tokens [windows, tokens], or a dataset of mappings with ``input_ids`` [tokens] and, where rows are
            padded, ``attention_mask`` [tokens].
        batch_size: windows that go through the model at once.
    """

    windows: Tensor | Dataset[Any]
    batch_size: int = 8

    def data(self, share: Mapping[str, int] | None = None) -> PruningData:
        """Return the windows as Lightning loads them.

        Args:
            share: which are this process's, where no trainer deals them out; None for all.
        """
        return PruningData(self.windows, batch_size=self.batch_size, share=share)

    def batches(self, share: Mapping[str, int] | None = None) -> list[Batch]:
        """Return the windows in batches; ``share`` as for ``data``."""
        return list(self.data(share).predict_dataloader())


class Executor(ABC):
    """Holds the weights of a model and runs them.

    Attributes:
        model: the model, pruned in place.
        sites: the dense model's sites.
        progress: what its stages report to.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    progress: Progress

    @abstractmethod
    def score(self, score: Score, scoring: Sequence[type[Statistic]], repairing: Sequence[type[Statistic]]) -> Scores:
        """Measure every site of the dense model, and score each while its weights are in memory.

        Args:
            score: scores some sites.
            scoring: what it needs, as classes.
            repairing: what ``repair_`` will need; measured in the same pass and kept, if memory holds it.
        """

    @abstractmethod
    def objective(
        self, kind: Literal["perplexity", "kl"], correct: Correct, repairing: Sequence[type[Statistic]]
    ) -> Objective:
        """Return what plans are tried by: each is carried out on a copy that shares the model's weights.

        Args:
            kind: what is minimised.
            correct: computes the corrections of some sites.
            repairing: what it needs, as classes.

        Raises:
            RecipeError: plans cannot be tried here.
        """

    @abstractmethod
    def repair_(self, plan: PruningPlan, repair: Repair, repairing: Sequence[type[Statistic]]) -> Repairs:
        """Carry a plan out in place: measure what repairs need, compute them, and slice.

        Args:
            plan: the units to keep.
            repair: computes the corrections of some sites.
            repairing: what it needs, as classes.
        """

    @abstractmethod
    def repair_in_sequence_(self, plan: PruningPlan, compensators: Sequence[Compensator]) -> Repairs:
        """The same in one sweep over the layers, in which each site makes good what the earlier ones lost.

        Args:
            plan: the units to keep.
            compensators: at most one corrects.
        """

    @abstractmethod
    def observe(
        self, sites: Sequence[Site], statistic: type[Statistic], batches: Sequence[Batch]
    ) -> Iterator[Statistics]:
        """Measure one statistic of the model as it is now, and yield it for sites whose weights are in memory.

        Args:
            sites: where to measure.
            statistic: what to measure.
            batches: the text.
        """

    @abstractmethod
    def evaluate(self, texts: Mapping[str, EvaluationText], name: str) -> dict[str, MeasuredPerplexity]:
        """Measure the perplexity of the model as it is now.

        Args:
            texts: name -> text.
            name: what the stage is called.

        Raises:
            RunError: a loss that is not finite, or a window that the device's memory does not hold.
        """

    @classmethod
    @abstractmethod
    def needs(cls, workload: Workload) -> Needs:
        """Return what such an executor needs for a workload.

        Raises:
            ModelError: it cannot hold such a model.
        """

    @property
    def shards(self) -> Sequence[Path]:
        """The files that hold the pruned weights already; empty where they are in memory."""
        return ()


def prune_(executor: Executor, method: Method, budget: Budget, *, sequential: bool = False) -> Pruned:
    """Prune a model in place: score, plan, repair, slice.

    Args:
        executor: holds the dense model.
        method: the components.
        budget: how much to remove.
        sequential: repair in one sweep over the layers, in which each site makes good what the earlier ones lost.

    Raises:
        FlapkitError: whatever keeps the model from being pruned; it is then as it was.
    """

    def score(sites: Sequence[Site], statistics: Statistics) -> Scores:
        return score_sites(executor.model, sites, statistics, method.metric)

    def repair(sites: Sequence[Site], statistics: Statistics) -> Repairs:
        return repair_sites(executor.model, sites, statistics, method.compensators, plan)

    def correct(sites: Sequence[Site], statistics: Statistics, plan: PruningPlan) -> Mapping[str, Correction]:
        return find_corrections(executor.model, sites, statistics, method.compensators, plan)

    scores: Scores = {}
    if method.searcher.uses_scores:
        ahead = () if sequential else method.repairing
        scores = executor.score(score, method.scoring, ahead)
    plan = _find_plan(executor, method, budget, scores, correct)
    if sequential:
        repairs = executor.repair_in_sequence_(plan, method.compensators)
    else:
        repairs = executor.repair_(plan, repair, method.repairing)
    return Pruned(scores, plan, repairs.notes, repairs.expected)


def _find_plan(executor: Executor, method: Method, budget: Budget, scores: Scores, correct: Correct) -> PruningPlan:
    """Let the searcher choose, by trials if it tries plans."""
    searcher = method.searcher
    if not isinstance(searcher, TrialSearcher) or not budget.params:
        with executor.progress.stage("search"):
            return find_plan(executor.sites, scores, searcher, budget)
    with executor.progress.stage("search", searcher.expected_trials, "trials") as stage:
        objective = executor.objective(searcher.objective, correct, method.repairing)

        def tried(plan: PruningPlan, share: float = 1.0) -> float:
            value = objective(plan, share)
            stage.advance()
            return value

        return find_plan(executor.sites, scores, searcher, budget, tried)


@torch.no_grad()
def sweep(
    runner: Runner,
    sites: Sequence[Site],
    plan: PruningPlan,
    compensators: Sequence[Compensator],
    batches: Sequence[Batch],
    hidden: Callable[[str], Hidden],
    keep: Keep = make_without_store,
) -> Iterator[tuple[int, Repairs]]:
    """Repair layer by layer, and yield each layer, loaded and dense, with the corrections of its sites.

    Args:
        runner: runs the dense model's layers.
        sites: the model's sites.
        plan: the units to keep.
        compensators: at most one corrects.
        batches: the calibration text, or this process's share of it.
        hidden: makes a place for hidden states, by a name.
        keep: finds what a stopped run has finished, and keeps what this one finishes.
    """
    dense, pruned = hidden("dense"), hidden("pruned")
    for number, batch in enumerate(batches):
        arrived = runner.embed(batch)
        dense.put(number, arrived)
        pruned.put(number, arrived)
    dense.advance()
    pruned.advance()
    for index in range(len(runner)):
        with runner.loaded(index) as layer:
            in_layer = [site for site in sites if site.layer == index]
            targets = {site.name: hidden(f"target-{site.name}") for site in in_layer if site.expert is None}
            repair = LayerRepair(runner, index, in_layer, batches, dense, pruned, targets)
            repair.run_dense()
            runner.layers[index] = copy_layer(runner.model, layer, in_layer)
            try:
                record = keep(f"repair of layer {index}", lambda: record_of(repair.repair(compensators, plan)))  # noqa: B023
                repairs = repairs_of(record)
                if in_layer and not repair.masked:
                    repair.mask_(in_layer, plan, repairs)
                repair.run_pruned()
            finally:
                runner.layers[index] = layer
            for target in targets.values():
                target.clear()
            yield index, repairs
        dense.advance()
        pruned.advance()
    dense.clear()
    pruned.clear()


def record_of(repairs: Repairs) -> Record:
    """Write repairs as tensors and JSON."""
    parts = {f"{name}/weight": correction.weight for name, correction in repairs.corrections.items()}
    parts |= {f"{name}/bias": correction.bias for name, correction in repairs.corrections.items()}
    notes = {name: correction.note for name, correction in repairs.corrections.items()}
    tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
    return Record(tensors, {"notes": notes, "expected": dict(repairs.expected)})


def repairs_of(record: Record) -> Repairs:
    """Read what ``record_of`` wrote."""
    corrections = {
        name: Correction(record.tensors.get(f"{name}/weight"), record.tensors.get(f"{name}/bias"), note)
        for name, note in record.metadata["notes"].items()
    }
    return Repairs(corrections, record.metadata["expected"])
