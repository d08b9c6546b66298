"""The pruning algorithm, and the interface of executors, which hold a model's weights and run them.

``WholeExecutor`` holds the whole model in memory, ``LayerwiseExecutor`` one decoder layer at a time. Both measure,
repair, slice and evaluate; ``prune_``, in its two halves ``search`` and ``repair_``, is the same for both.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel

from flapkit.evaluation.protocol import EvaluationText, MeasuredPerplexity
from flapkit.execution.lightning.data import PruningData, held_out
from flapkit.execution.needs import Needs, Workload
from flapkit.execution.record_files import Record
from flapkit.execution.resume import Resume, make_without_store
from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.positions import check_lengths
from flapkit.model.site import Site, by_layer
from flapkit.model.spread import vocabulary_of
from flapkit.model.surgery import Correction
from flapkit.pruning.algorithm import (
    Method,
    Pruned,
    Repairs,
    check_nested,
    check_scored,
    check_states,
    find_corrections,
    find_plan,
    repair_sites,
    score_sites,
)
from flapkit.pruning.collector import Batch, Statistics
from flapkit.pruning.components import Compensator, Objective, TrainedSearcher, TrialSearcher
from flapkit.pruning.sequential import Hidden, LayerRepair, Runner, layer_copied
from flapkit.pruning.statistics import Statistic, size_of
from flapkit.system.errors import CalibrationError, RecipeError
from flapkit.system.progress import Progress
from flapkit.text.windows import check_vocabulary

Scores = Mapping[str, Tensor]
"""Site name -> scores [units, k], float64 on the CPU."""

Score = Callable[[Sequence[Site], Statistics], Scores]
"""Scores some sites, whose weights are in memory, from their statistics: site name -> scores [units, k]."""

Repair = Callable[[Sequence[Site], Statistics], Repairs]
"""Computes the corrections of some sites, whose weights are in memory, from their statistics."""

Correct = Callable[[Sequence[Site], Statistics, PruningPlan], Mapping[str, Correction]]
"""Computes the corrections of some sites for a plan: site name -> correction."""


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """The text on which statistics are measured.

    Args:
        windows: tokens [windows, tokens], or a dataset of mappings with ``input_ids`` [tokens] and, where rows are
            padded, ``attention_mask`` [tokens].
        batch_size: windows that go through the model at once.
    """

    windows: Tensor | Dataset[Any]
    batch_size: int = 8

    def __len__(self) -> int:
        return len(self.windows)  # type: ignore[arg-type]

    def data(self, share: Mapping[str, int] | None = None) -> PruningData:
        """Return the windows as a data module of Lightning.

        Args:
            share: selects this process's windows, where no trainer distributes them; None for all.
        """
        return PruningData(self.windows, batch_size=self.batch_size, share=share)

    def batches(self, share: Mapping[str, int] | None = None) -> list[Batch]:
        """Return the windows in batches; ``share`` as for ``data``."""
        return list(self.data(share).predict_dataloader())

    def fitted(self) -> CalibrationText:
        """Return the text without its held-out windows."""
        left = (~held_out(len(self))).nonzero()[:, 0]
        windows = self.windows[left] if isinstance(self.windows, Tensor) else Subset(self.windows, left.tolist())
        return CalibrationText(windows, self.batch_size)

    def check(self, model: PreTrainedModel, name: str = "calibration") -> None:
        """Read all windows, and refuse those that are not for this model.

        Args:
            model: what the windows are to run through.
            name: name of the text, for messages.

        Raises:
            DataError: a token is not in the model's vocabulary.
            InputError: a window is longer than the model's table of positions.
        """
        vocabulary, longest = vocabulary_of(model), 0
        for batch in self.data().predict_dataloader():
            check_vocabulary(batch["input_ids"], vocabulary)
            longest = max(longest, batch["input_ids"].shape[1])
        check_lengths(model, {name: longest})


@dataclass(frozen=True, slots=True)
class LearnedPlan:
    """The result of training gates.

    Args:
        plan: the units to keep at the gated sites.
        losses: optimizer step, from 1 -> mean loss on its windows, in nats.
        validations: optimizer step -> mean loss on the held-out windows, in nats.
        best_step: the step whose plan was chosen.
    """

    plan: PruningPlan
    losses: Mapping[int, float]
    validations: Mapping[int, float]
    best_step: int

    def summary(self) -> dict[str, Any]:
        """Summarise it for ``result.json``."""
        return {
            "best_step": self.best_step,
            "steps": max(self.validations),
            "training_loss": {str(step): loss for step, loss in self.losses.items()},
            "validation_loss": {str(step): loss for step, loss in self.validations.items()},
        }


@dataclass(slots=True)
class TrialHistory:
    """The trials of a search so far.

    Args:
        objective: what the search minimises.
        trials: how many there were.
        values: trial, from 1 -> its value, of those on all trial windows.
    """

    objective: str
    trials: int = 0
    values: dict[int, float] = field(default_factory=dict)

    def add(self, value: float, share: float) -> None:
        """Add a trial on a share of the trial windows."""
        self.trials += 1
        if share == 1:
            self.values[self.trials] = value

    def summary(self) -> dict[str, Any]:
        """Summarise it for ``result.json``; a value that is not finite is None."""
        finite = {trial: value for trial, value in self.values.items() if math.isfinite(value)}
        return {
            "objective": self.objective,
            "trials": self.trials,
            "best_trial": min(finite, key=finite.__getitem__, default=None),
            "values": {str(trial): finite.get(trial) for trial in self.values},
        }


class Executor(ABC):
    """Holds the weights of a model and runs them.

    Attributes:
        model: the model, pruned in place.
        sites: the dense model's sites.
        progress: receives the progress of its stages.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    progress: Progress

    @abstractmethod
    def for_search(self, method: Method) -> Executor:
        """Return an executor for a search that judges plans: its statistics leave out the held-out windows.

        It runs the same model. ``objective`` and ``learn`` judge on the held-out windows.

        Args:
            method: the components.

        Raises:
            RecipeError: its statistics do not fit in memory together.
        """

    @abstractmethod
    def score(self, score: Score, scoring: Sequence[type[Statistic]], repairing: Sequence[type[Statistic]]) -> Scores:
        """Measure every site of the dense model, and score it while its weights are in memory.

        Args:
            score: scores some sites.
            scoring: classes of the statistics that it needs.
            repairing: classes of the statistics that ``repair_`` will need; measured in the same pass if they fit in
                memory.
        """

    @abstractmethod
    def objective(
        self, kind: Literal["perplexity", "kl"], correct: Correct, repairing: Sequence[type[Statistic]]
    ) -> Objective:
        """Return the objective of trial searchers. Each plan is applied to a copy that shares the model's weights.

        Args:
            kind: what is minimised.
            correct: computes the corrections of some sites.
            repairing: classes of the statistics that it needs.
        """

    def plans_together(self, share: float) -> int:
        """Return how many plans the objective evaluates at once; a searcher's call of it is divided.

        Args:
            share: of the trial windows.
        """
        return 1

    @abstractmethod
    def learn(self, searcher: TrainedSearcher, sites: Sequence[Site], scores: Scores, budget: Budget) -> LearnedPlan:
        """Train the gates of a searcher, with the model's weights frozen.

        Args:
            searcher: describes the gates and the training.
            sites: the prunable sites.
            scores: site name -> scores [units, k].
            budget: how much to remove.

        Raises:
            RecipeError: this executor cannot train.
            RunError: a loss is not finite.
        """

    @abstractmethod
    def repair_(self, plan: PruningPlan, repair: Repair, repairing: Sequence[type[Statistic]]) -> Repairs:
        """Apply a plan in place: measure the statistics for the corrections, compute these, and slice.

        Args:
            plan: the units to keep.
            repair: computes the corrections of some sites.
            repairing: classes of the statistics that it needs.
        """

    @abstractmethod
    def repair_in_sequence_(self, plan: PruningPlan, compensators: Sequence[Compensator]) -> Repairs:
        """Apply a plan in place, in one sweep over the layers; each site also repairs the error of the earlier ones.

        Args:
            plan: the units to keep.
            compensators: at most one corrects.
        """

    @abstractmethod
    def observe(
        self, sites: Sequence[Site], statistic: type[Statistic], batches: Sequence[Batch]
    ) -> Iterator[Statistics]:
        """Measure one statistic of the model in its current state; yield it for the sites whose weights are in memory.

        Args:
            sites: the sites to measure.
            statistic: class of the statistic.
            batches: the text.
        """

    @abstractmethod
    def evaluate(self, texts: Mapping[str, EvaluationText], name: str) -> dict[str, MeasuredPerplexity]:
        """Measure the perplexity of the model in its current state.

        Args:
            texts: name -> text.
            name: name of the stage.

        Raises:
            RunError: a loss is not finite, or a window does not fit in the device's memory.
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
        """The files that already hold the pruned weights; empty where these are in memory."""
        return ()


@dataclass(frozen=True, slots=True)
class Searched:
    """The result of scoring and searching.

    Args:
        scores: site name -> scores [units, k]; empty where the searcher uses none.
        plan: the units to keep.
        course: the course of a search by trials or training, for ``result.json``; empty otherwise.
    """

    scores: Scores
    plan: PruningPlan
    course: Mapping[str, Any]


def prune_(executor: Executor, method: Method, budget: Budget, *, sequential: bool = False) -> Pruned:
    """Prune a model in place: score, plan, repair, slice.

    Args:
        executor: holds the dense model.
        method: the components.
        budget: how much to remove.
        sequential: repair in one sweep over the layers, in which each site also repairs the error of the earlier ones.

    Raises:
        FlapkitError: the model cannot be pruned; it is then unchanged.
    """
    searched = search(executor, method, budget, sequential=sequential)
    repairs = repair_(executor, method, searched.plan, sequential=sequential)
    return Pruned(searched.scores, searched.plan, repairs.notes, repairs.expected, searched.course)


def search(executor: Executor, method: Method, budget: Budget, *, sequential: bool = False) -> Searched:
    """Score the units, and choose those to keep; the model stays dense.

    The plan is the same with and without sequential repair. A searcher that judges plans does so on the held-out
    windows; the statistics behind its scores and its trials' corrections are those of the others. The corrections of
    its plan are computed on all windows.

    Args:
        executor: holds the dense model.
        method: the components.
        budget: how much to remove.
        sequential: the repair will be sequential, so that nothing need be measured for it now.

    Raises:
        FlapkitError: the model cannot be pruned.
    """

    def score(sites: Sequence[Site], statistics: Statistics) -> Scores:
        return score_sites(executor.model, sites, statistics, method.metric)

    def correct(sites: Sequence[Site], statistics: Statistics, plan: PruningPlan) -> Mapping[str, Correction]:
        return find_corrections(executor.model, sites, statistics, method.compensators, plan)

    if method.judges and budget.amount:
        executor = executor.for_search(method)
    check_nested(method.searcher, executor.sites)
    check_states(method.statistics, executor.sites)
    scores: Scores = {}
    if method.searcher.uses_scores:
        check_scored(method.metric, executor.sites)
        scores = executor.score(score, method.scoring, needed_for_search(method, sequential=sequential))
    plan, course = _find_plan(executor, method, budget, scores, correct)
    return Searched(scores, plan, course)


def check_search(method: Method, sites: Sequence[Site], memory: float, of: str = "all sites") -> None:
    """Refuse a search that judges plans and whose statistics do not fit in memory together.

    Args:
        method: the components.
        sites: all sites of the model, or those of a layer.
        memory: bytes of statistics at a time.
        of: what the sites are, for the message.

    Raises:
        RecipeError: they do not fit.
    """
    statistics = tuple(dict.fromkeys([*method.scoring, *needed_for_search(method, sequential=True)]))
    if method.judges and (needed := size_of(statistics, sites)) > memory:
        raise RecipeError(
            f"searcher {method.searcher.name!r} needs the statistics of {of} in memory together, "
            f"{needed / 1e9:,.2f} GB; calibration.statistics_memory is {memory / 1e9:,.2f} GB: raise it"
        )


def check_search_by_layers(method: Method, sites: Sequence[Site], memory: float) -> None:
    """Refuse a search layer by layer, if the statistics of a layer do not fit in memory; see ``check_search``."""
    for index, in_layer in by_layer(sites).items():
        check_search(method, in_layer, memory, f"layer {index}")


def check_judged(method: Method, text: CalibrationText) -> None:
    """Refuse text without its held-out windows, for a search, that holds out none for the repair, if that needs some.

    Args:
        method: the components.
        text: the windows that are measured.

    Raises:
        CalibrationError: there are too few windows.
    """
    holds_out = any(statistic.windows == "held_out" for statistic in needed_for_search(method, sequential=True))
    if holds_out and not held_out(len(text)).any():
        raise CalibrationError(
            "calibration: plans are judged on one window of four, and their repair holds out one in four of the "
            "others; use at least five windows, or a repair that holds out none (ridge: 0.01)"
        )


def needed_for_search(method: Method, *, sequential: bool) -> tuple[type[Statistic], ...]:
    """List the statistics of the corrections that are measured with those of the scores.

    Trials are repaired site by site, also where the repair of the plan that wins is sequential. For that plan the
    statistics are measured again, on all windows.
    """
    if method.judges:
        return method.repairing if isinstance(method.searcher, TrialSearcher) else ()
    return () if sequential else method.repairing


def repair_(executor: Executor, method: Method, plan: PruningPlan, *, sequential: bool = False) -> Repairs:
    """Apply a plan in place: repair and slice.

    Args:
        executor: holds the dense model.
        method: the components.
        plan: the units to keep.
        sequential: as for ``prune_``.

    Raises:
        FlapkitError: the model cannot be repaired; it is then unchanged.
    """

    def repair(sites: Sequence[Site], statistics: Statistics) -> Repairs:
        return repair_sites(executor.model, sites, statistics, method.compensators, plan)

    if sequential:
        return executor.repair_in_sequence_(plan, method.compensators)
    return executor.repair_(plan, repair, method.repairing)


def _find_plan(
    executor: Executor, method: Method, budget: Budget, scores: Scores, correct: Correct
) -> tuple[PruningPlan, Mapping[str, Any]]:
    """Let the searcher choose: by trials if it tries plans, by training if it trains gates.

    Returns:
        The plan, and the course of the search for ``result.json``: of all trials or steps, also those of the run that a
        resumed one continues.
    """
    searcher = method.searcher
    if isinstance(searcher, TrainedSearcher) and budget.amount:
        course: dict[str, Any] = {}

        def learn(searcher: TrainedSearcher, sites: Sequence[Site], scores: Scores) -> PruningPlan:
            learned = executor.learn(searcher, sites, scores, budget)
            course.update(learned.summary())
            return learned.plan

        return find_plan(executor.sites, scores, searcher, budget, learn=learn), course
    if not isinstance(searcher, TrialSearcher) or not budget.amount:
        with executor.progress.stage("search"):
            return find_plan(executor.sites, scores, searcher, budget), {}
    with executor.progress.stage("search", searcher.expected_trials, "trials") as stage:
        objective = executor.objective(searcher.objective, correct, method.repairing)
        history = TrialHistory(searcher.objective)

        def tried(plans: Sequence[PruningPlan], share: float = 1.0) -> list[float]:
            values: list[float] = []
            together = executor.plans_together(share)
            for start in range(0, len(plans), together):
                part = plans[start : start + together]
                for value in objective(part, share):
                    history.add(value, share)
                    values.append(value)
                stage.advance(len(part))
            return values

        return find_plan(executor.sites, scores, searcher, budget, tried), history.summary()


def digest_of(plans: Sequence[PruningPlan]) -> str:
    """Return a short hash of some plans, to name what an interrupted search has tried."""
    return hashlib.sha256("".join(plan.to_json() for plan in plans).encode()).hexdigest()[:32]


@torch.no_grad()
def sweep(
    runner: Runner,
    sites: Sequence[Site],
    plan: PruningPlan,
    compensators: Sequence[Compensator],
    batches: Sequence[Batch],
    hidden: Callable[[str], Hidden],
    resume: Resume = make_without_store,
) -> Iterator[tuple[int, Repairs]]:
    """Repair layer by layer. Yield the index of each layer, which is loaded and dense, and the repairs of its sites.

    Args:
        runner: runs the dense model's layers.
        sites: the model's sites.
        plan: the units to keep.
        compensators: at most one corrects.
        batches: the calibration text, or this process's share of it.
        hidden: creates a store of hidden states, given its name.
        resume: reads what an interrupted run has finished, and stores what this one finishes.
    """
    dense, pruned, layers = hidden("dense"), hidden("pruned"), by_layer(sites)
    for number, batch in enumerate(batches):
        embedded = runner.embed(batch)
        dense.put(number, embedded)
        pruned.put(number, embedded)
    dense.advance()
    pruned.advance()
    for index in range(len(runner)):
        with runner.loaded(index):
            in_layer = layers.get(index, [])
            targets = {site.name: hidden(f"target-{site.name}") for site in in_layer if not site.stacked}
            repair = LayerRepair(runner, index, in_layer, batches, dense, pruned, targets)
            repair.run_dense()
            with layer_copied(runner, index, in_layer):
                record = resume(f"repair of layer {index}", lambda: record_of(repair.repair(compensators, plan)))  # noqa: B023
                repairs = repairs_of(record)
                if in_layer and not repair.masked:
                    repair.mask_(in_layer, plan, repairs)
                repair.run_pruned()
            for target in targets.values():
                target.clear()
            yield index, repairs
        dense.advance()
        pruned.advance()
    dense.clear()
    pruned.clear()


def record_of(repairs: Repairs) -> Record:
    """Convert repairs to tensors and JSON."""
    parts = {f"{name}/weight": correction.weight for name, correction in repairs.corrections.items()}
    parts |= {f"{name}/bias": correction.bias for name, correction in repairs.corrections.items()}
    notes = {name: correction.note for name, correction in repairs.corrections.items()}
    tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
    return Record(tensors, {"notes": notes, "expected": dict(repairs.expected)})


def repairs_of(record: Record) -> Repairs:
    """Convert a record of ``record_of`` back to repairs."""
    corrections = {
        name: Correction(record.tensors.get(f"{name}/weight"), record.tensors.get(f"{name}/bias"), note)
        for name, note in record.metadata["notes"].items()
    }
    return Repairs(corrections, record.metadata["expected"])
