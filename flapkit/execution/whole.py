"""The executor that holds the whole model in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from flapkit.checkpoint.load import restore_plan_
from flapkit.evaluation.protocol import EvaluationText, MeasuredPerplexity
from flapkit.execution.cache import Calibrated, SiteStates, read_statistic, write_statistic
from flapkit.execution.executor import (
    CalibrationText,
    Correct,
    Executor,
    LearnedPlan,
    Repair,
    Score,
    Scores,
    check_judged,
    check_search,
    digest_of,
    record_of,
    repairs_of,
    sweep,
)
from flapkit.execution.needs import Needs, Workload
from flapkit.execution.record_files import Record
from flapkit.execution.resume import Resume, make_without_store
from flapkit.execution.runtime import Runtime
from flapkit.execution.stream import HiddenStates, LayerRunner, layers_of
from flapkit.execution.training import Workplace, learn_plan
from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.precision import round_
from flapkit.model.site import Site
from flapkit.model.spread import embeddings_device, is_spread
from flapkit.model.surgery import Correction, apply_plan_, weight_of
from flapkit.pruning.algorithm import Method, Repairs
from flapkit.pruning.collector import Batch, Statistics, measure
from flapkit.pruning.components import Compensator, Objective, TrainedSearcher
from flapkit.pruning.statistics import SiteStatistics, Statistic, size_of, split_by_memory
from flapkit.pruning.trials import Trials, held_out_windows
from flapkit.system.float64 import float64_device
from flapkit.system.processes import is_rank_zero, keep_common, window_share
from flapkit.system.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class WholeExecutor(Executor):
    """Holds the whole model in memory, and runs it with Lightning.

    Statistics are measured in one pass over the calibration text if they fit in memory together; otherwise in several
    passes, each for a few sites.

    Args:
        model: the dense model, pruned in place.
        sites: its sites.
        text: the calibration text.
        runtime: what it runs on; None to run batches in a plain loop on the model's device, as inside a trainer.
        memory: bytes of statistics at a time.
        cache: folder of cached statistics; None for no cache.
        resume: reads what an interrupted run has finished, and stores what this one finishes.
        statistics: site name -> statistics that are measured already.
        saved: dtype of the checkpoint to be written, to which pruned weights are rounded; by default the model's.
        folder: where a training of gates stores its checkpoints; None for no checkpoints.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        text: CalibrationText,
        runtime: Runtime | None = None,
        *,
        memory: float = 4e9,
        cache: Path | None = None,
        resume: Resume = make_without_store,
        statistics: Statistics | None = None,
        saved: torch.dtype | None = None,
        folder: Path | None = None,
    ) -> None:
        # Of a pruned model, which transformers may have loaded, the new plan is added to that of its folder.
        restore_plan_(model)
        self.model = model
        self.sites = sites
        self._text = self._judging = text
        self.progress = runtime.progress if runtime else Progress()
        self._runtime = runtime
        self._memory = memory
        self._cache = cache
        self._resume = resume
        self._saved = saved or model.dtype
        self._folder = folder
        self._measured: Statistics = statistics or {site.name: SiteStatistics([]) for site in sites}

    def for_search(self, method: Method) -> WholeExecutor:
        """Return an executor of the same model that measures its statistics without the held-out windows."""
        check_search(method, self.sites, self._memory)
        text = self._text.fitted()
        check_judged(method, text)
        searching = WholeExecutor(
            self.model,
            self.sites,
            text,
            self._runtime,
            memory=self._memory,
            cache=self._cache,
            resume=self._resume,
            folder=self._folder,
        )
        searching._judging = self._text
        return searching

    def score(self, score: Score, scoring: Sequence[type[Statistic]], repairing: Sequence[type[Statistic]]) -> Scores:
        """Measure every site, and score it."""
        together = tuple(dict.fromkeys([*scoring, *repairing]))
        if self._fits(together):
            return score(self.sites, self._measure_all(together))
        scores: dict[str, Tensor] = {}
        for part in split_by_memory(self.sites, scoring, self._memory):
            make = partial(self._make, part, scoring, lambda *measured: Record(score(*measured)))
            scores |= self._resume(f"scores from {part[0].name}", make).tensors
        return scores

    def objective(
        self, kind: Literal["perplexity", "kl"], correct: Correct, repairing: Sequence[type[Statistic]]
    ) -> Objective:
        """Return the objective of trial searchers, on held-out calibration windows."""
        statistics = self._measure_all(repairing)
        # All processes must find the same plan, so each uses the windows of all.
        windows = held_out_windows(self._judging.batches())

        def correct_(sites: Sequence[Site], plan: PruningPlan) -> Mapping[str, Correction]:
            return correct(sites, statistics, plan)

        trials = Trials(self.model, self.sites, kind, windows, correct_, self._memory)

        def make(plan: PruningPlan, share: float) -> Record:
            return Record({"value": torch.tensor(trials(plan, share), dtype=torch.float64)})

        def tried(plans: Sequence[PruningPlan], share: float = 1.0) -> list[float]:
            names = [f"trial {digest_of([plan])} {share:g}" for plan in plans]
            records = [self._resume(name, partial(make, plan, share)) for name, plan in zip(names, plans, strict=True)]
            return [float(record.tensors["value"]) for record in records]

        return tried

    def learn(self, searcher: TrainedSearcher, sites: Sequence[Site], scores: Scores, budget: Budget) -> LearnedPlan:
        """Train the gates of a searcher on the calibration text."""

        def make() -> Record:
            measured = self._measure_all(searcher.measures())
            visible = {site.name: measured[site.name].only(searcher.measures()) for site in sites}
            gates = searcher.gates(sites, scores, visible, budget)
            runtime, training = self._runtime or Runtime.on(self.model.device), searcher.training
            workplace = Workplace(self._folder / "search", asdict(training)) if self._folder else None
            batches = self._judging.batches()
            learned = learn_plan(self.model, sites, gates, training, batches, runtime, workplace=workplace)
            curves = {"losses": list(learned.losses.items()), "validations": list(learned.validations.items())}
            return Record({}, {"plan": learned.plan.to_json(), **curves})

        metadata = self._resume("trained gates", make).metadata
        self._place()
        losses, validations = (
            {int(step): float(loss) for step, loss in metadata[name]} for name in ("losses", "validations")
        )
        plan = PruningPlan.from_json(metadata["plan"])
        return LearnedPlan(plan, losses, validations, min(validations, key=validations.__getitem__))

    def repair_(self, plan: PruningPlan, repair: Repair, repairing: Sequence[type[Statistic]]) -> Repairs:
        """Measure the statistics for the corrections, compute these, and slice."""
        with self.progress.stage("prune"):
            if self._fits(repairing):
                repairs = repair(self.sites, self._measure_all(repairing))
            else:
                repairs, pruned = Repairs(), [site for site in self.sites if plan.removed_units(site)]
                for part in split_by_memory(pruned, repairing, self._memory):
                    make = partial(self._make, part, repairing, lambda *measured: record_of(repair(*measured)))
                    repairs = repairs.merged(repairs_of(self._resume(f"repair from {part[0].name}", make)))
            self._apply_(plan, repairs)
            return repairs

    def repair_in_sequence_(self, plan: PruningPlan, compensators: Sequence[Compensator]) -> Repairs:
        """Repair in one sweep over the layers, and slice."""
        self._place()
        device = embeddings_device(self.model)
        precision = self._runtime.precision if self._runtime else nullcontext
        runner = LayerRunner(self.model, layers_of(self.sites), device, precision)
        with self.progress.stage("prune", len(runner), "layers") as stage:
            batches, repairs = self._text.batches(window_share()), Repairs()
            sweeping = sweep(runner, self.sites, plan, compensators, batches, lambda name: HiddenStates(), self._resume)
            for _, repaired in sweeping:
                repairs = repairs.merged(repaired)
                stage.advance()
            self._apply_(plan, repairs)
        return repairs

    def observe(
        self, sites: Sequence[Site], statistic: type[Statistic], batches: Sequence[Batch]
    ) -> Iterator[Statistics]:
        """Measure one statistic of the model in its current state."""
        self._place()
        yield measure(self.model, sites, [statistic], batches)

    def evaluate(self, texts: Mapping[str, EvaluationText], name: str) -> dict[str, MeasuredPerplexity]:
        """Measure the perplexity of the model in its current state."""
        return (self._runtime or Runtime()).evaluate(self.model, texts, name)

    @classmethod
    def needs(cls, workload: Workload) -> Needs:
        """Return the needs of a whole model in memory."""
        least = workload.weights + workload.waiting_weights + workload.statistics + workload.working
        least += workload.hidden if workload.sequential else 0
        # The pruned weights are in memory beside the file from which the dense weights are mapped.
        blocks = sum(site.params for site in workload.sites) - workload.removed
        return Needs(least + blocks * workload.model.dtype.itemsize, least, workload.written_weights)

    def calibrate(self, statistics: Sequence[type[Statistic]]) -> Statistics | None:
        """Measure statistics of all sites in one pass; None if they do not fit in memory together."""
        return self._measure_all(statistics) if self._fits(statistics) else None

    def _apply_(self, plan: PruningPlan, repairs: Repairs) -> None:
        """Slice and correct the model, whose weights are those of its checkpoint from now on."""
        apply_plan_(self.model, self.sites, plan, repairs.corrections)
        if self._saved != self.model.dtype:
            round_(self.model, self._saved)

    def _fits(self, statistics: Sequence[type[Statistic]]) -> bool:
        """Tell whether statistics of all sites fit in memory together, not counting those that are there already."""
        missing = self._missing(statistics)
        return not missing or size_of(tuple(statistics), self.sites) <= self._memory

    def _missing(self, statistics: Sequence[type[Statistic]]) -> list[type[Statistic]]:
        known = next(iter(self._measured.values()), ())
        return [statistic for statistic in statistics if statistic not in known]

    def _make(
        self, sites: Sequence[Site], statistics: Sequence[type[Statistic]], work: Callable[..., Record]
    ) -> Record:
        """Measure some sites, and pass them and their statistics to ``work``."""
        # Statistics of all sites are cached.
        all_sites = len(sites) == len(self.sites)
        measured = self._measure_all(statistics) if all_sites else self._measure(sites, statistics)
        self._place()
        return work(sites, measured)

    def _measure_all(self, statistics: Sequence[type[Statistic]]) -> Statistics:
        """Measure the missing statistics at all sites; they stay in memory."""
        if missing := self._missing(statistics):
            cached = self._look_up(missing)
            new = [statistic for statistic in missing if statistic not in cached]
            measured = self._measure(self.sites, new)
            self._measured = {
                site.name: SiteStatistics(
                    [
                        *self._measured[site.name].values(),
                        *measured[site.name].values(),
                        *(states[site.name] for states in cached.values()),
                    ]
                )
                for site in self.sites
            }
            self._write(new, measured)
        self._place()
        return self._measured

    def _measure(self, sites: Sequence[Site], statistics: Sequence[type[Statistic]]) -> Statistics:
        if not statistics:
            return {site.name: SiteStatistics([]) for site in sites}
        if self._runtime:
            return self._runtime.calibrate(self.model, sites, statistics, self._text.data(), stop_early=True)
        return measure(self.model, sites, statistics, self._text.data().predict_dataloader(), stop_early=True)

    def _look_up(self, statistics: Sequence[type[Statistic]]) -> dict[type[Statistic], SiteStates]:
        """Read cached statistics: those that all processes find."""
        if self._cache is None or self._runtime is None:
            return {}
        with self._runtime.progress.stage("find statistics"):
            key = self._calibration_key
            cached = keep_common({kind: read_statistic(self._cache, key, kind, self._device_of) for kind in statistics})
        if len(cached) == len(statistics):
            log.info("calibration: all statistics are from the cache, %s; --no-cache measures them again", self._cache)
        return cached

    def _write(self, statistics: Sequence[type[Statistic]], measured: Statistics) -> None:
        if self._cache is None or self._runtime is None or not is_rank_zero():
            return
        for kind in statistics:
            states = {name: of_site[kind] for name, of_site in measured.items()}
            write_statistic(self._cache, self._calibration_key, kind, states)

    @cached_property
    def _calibration_key(self) -> Calibrated:
        """What cached statistics depend on; first used while the model is still dense."""
        assert self._runtime is not None
        return Calibrated.of(self.model, self.sites, self._text.data().calibration_rows(), self._runtime.numerics)

    def _device_of(self, site: Site) -> torch.device:
        """Return the device on which a site's statistics are used: that of its weights, once these are placed."""
        assert self._runtime is not None
        spread = is_spread(self.model)
        return float64_device(weight_of(self.model, site).device if spread else self._runtime.device)

    def _place(self) -> None:
        """Move the model to its device: Lightning leaves it on the CPU when a loop ends."""
        if self._runtime:
            self._runtime.place_(self.model)
