"""Run one point of a sweep: prune a copy of the dense model, train it if the point trains, and measure it."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flapkit.evaluation.protocol import MeasuredPerplexity
from flapkit.evaluation.scores import TaskScores
from flapkit.evaluation.zero_shot import by_task, main_scores
from flapkit.execution.executor import CalibrationText, repair_, search
from flapkit.execution.record_files import hash_tensors
from flapkit.execution.resume import ResumeStore
from flapkit.execution.runtime import Runtime
from flapkit.execution.student import WholeStudent
from flapkit.execution.training import RecoveryText, recover_
from flapkit.execution.whole import WholeExecutor
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import copy_sharing_weights
from flapkit.pruning.collector import Statistics
from flapkit.pruning.components import TrialSearcher, recovery_of
from flapkit.pruning.recovery import Recovery
from flapkit.recipe.validation import adapter_of
from flapkit.run.budget import open_budget
from flapkit.run.captured import capture_warnings
from flapkit.run.run_record import count_params, put_texts_beside
from flapkit.run.sweep.load import Point
from flapkit.run.sweep.results import PRUNED, RECOVERED, Row
from flapkit.run.sweep.schema import DENSE
from flapkit.run.target import Target
from flapkit.run.tasks import evaluate_tasks
from flapkit.run.text import RunText
from flapkit.system.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flapkit.evaluation.harness import Harness

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Dense:
    """The dense model that several points share.

    Args:
        model: the whole model, never changed.
        weights: SHA-256 of the weights.
        target: its configuration, adapter and sites.
        tokenizer: its tokenizer.
        runtime: the devices that it runs on.
        params: its number of parameters.
        saved: the type that a pruned model of its kind would be written in.
        store: what is computed once for several points, and kept for an interrupted sweep.
        cache: folder of the cache of statistics; None for no cache.
    """

    model: PreTrainedModel
    weights: str
    target: Target
    tokenizer: PreTrainedTokenizerBase
    runtime: Runtime
    params: int
    saved: torch.dtype
    store: ResumeStore
    cache: Path | None


@dataclass(frozen=True, slots=True)
class PointText:
    """All text of a point.

    Args:
        run: calibration and evaluation text.
        tasks: zero-shot tasks; None for none.
        recovery: text to train on; None if the point does not train.
    """

    run: RunText
    tasks: Harness | None
    recovery: RecoveryText | None

    @property
    def measured(self) -> str:
        """Hash of what models are measured on."""
        tokens = {name: evaluation.windows.labels for name, evaluation in self.run.evaluations.items()}
        return _hash(hash_tensors(tokens.items()), self.tasks.sha256 if self.tasks else None)

    @property
    def calibration(self) -> str:
        """Hash of the calibration text."""
        return hash_tensors([("calibration", self.run.calibration)])

    @property
    def training(self) -> str | None:
        """Hash of the text to train on, if there is one."""
        text = self.recovery
        return None if text is None else hash_tensors([("windows", text.windows), ("validation", text.validation)])


@dataclass(frozen=True, slots=True)
class Task:
    """A point, its text, and its id in the results."""

    point: Point
    text: PointText
    id: str

    @classmethod
    def of(cls, point: Point, text: PointText, dense: Dense) -> Task:
        """Identify a point by everything that its result depends on."""
        settings = point.recipe.recipe.model_dump_json(exclude={"output", "export"})
        texts = [text.calibration, text.measured, text.training]
        return cls(point, text, _hash(settings, dense.weights, *texts, *_files(point)))

    @property
    def sequential(self) -> bool:
        """Whether its repair is sequential."""
        return self.point.recipe.recipe.calibration.sequential

    def executor(
        self, model: PreTrainedModel, dense: Dense, runtime: Runtime, statistics: Statistics | None = None
    ) -> WholeExecutor:
        """Build the executor that prunes a copy of the dense model, or measures the dense model."""
        text = CalibrationText(self.text.run.calibration, self.text.run.batch_size)
        memory = self.point.recipe.recipe.calibration.statistics_bytes
        # What is trained next is rounded at the end.
        trains = recovery_of(self.point.recipe.compensators) is not None
        saved = model.dtype if trains else dense.saved
        sites, cache = dense.target.sites, dense.cache
        return WholeExecutor(
            model, sites, text, runtime, memory=memory, cache=cache, statistics=statistics, saved=saved
        )

    def search_key(self, dense: Dense) -> str:
        """Hash everything that the plan depends on: points that differ in their repair alone share it."""
        recipe = self.point.recipe
        settings = recipe.recipe.model_dump(mode="json", include={"model", "trainer", "metric", "searcher", "budget"})
        settings["adapter"] = str(dense.target.adapter)
        # Trials are repaired.
        repair = [spec.model_dump(mode="json") for component, spec in recipe.named_compensators if component.corrects]
        tried = repair if isinstance(recipe.searcher, TrialSearcher) else None
        text = [self.text.calibration, self.text.run.batch_size]
        return _hash(settings, tried, dense.weights, *text, *_files(self.point))


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _files(point: Point) -> list[str]:
    """Hash the files that a point's recipe names beside its model and its text: plugins, and options such as a plan."""
    recipe = point.recipe
    components = [recipe.metric, recipe.searcher, *recipe.compensators]
    options = [option for one in components for option in adapter_of(type(one)).dump_python(one).values()]
    files = [*map(Path, recipe.recipe.plugins), *(option for option in options if isinstance(option, Path))]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a model.

    Args:
        perplexity: name of the text -> perplexity.
        answers: zero-shot task -> scores.
    """

    perplexity: Mapping[str, MeasuredPerplexity]
    answers: Mapping[str, TaskScores]


def measure_dense(task: Task, dense: Dense) -> Measured:
    """Measure the dense model, or read the measurements of an interrupted sweep."""
    settings = task.point.recipe.recipe.evaluate.model_dump_json(exclude={"samples"})
    key = _hash(settings, dense.weights, task.text.measured)
    texts, runtime = task.text.run.evaluations, dense.runtime
    perplexity = partial(runtime.evaluate, dense.model, texts, "evaluate dense")
    answers = partial(evaluate_tasks, dense.model, dense.tokenizer, task.text.tasks, runtime, "zero-shot dense")
    return Measured(
        dense.store.perplexity(f"perplexity {key}", texts, perplexity),
        dense.store.figures(f"zero-shot {key}", dict[str, TaskScores], answers),
    )


def run_point(task: Task, dense: Dense, statistics: Statistics | None, before: Measured) -> Row:
    """Prune a copy of the dense model, train it if the point trains, and measure it; a failure is the row's error.

    Args:
        task: the point.
        dense: the dense model.
        statistics: site name -> statistics that are measured already; None if the point has to measure its own.
        before: what was measured of the dense model.
    """
    point = task.point
    progress = Progress(dense.runtime.progress.emit)
    runtime = Runtime(dense.runtime.options, progress)
    with capture_warnings() as warnings:
        try:
            runtime.place_(dense.model)
            model, plan, minutes = _prune(task, dense, runtime, statistics)
            params = count_params(dense.target, plan, dense.params, model.num_parameters())
            stage = RECOVERED if task.text.recovery is not None else PRUNED
            after = Measured(
                runtime.evaluate(model, task.text.run.evaluations, f"evaluate {stage}"),
                evaluate_tasks(model, dense.tokenizer, task.text.tasks, runtime, f"zero-shot {stage}"),
            )
        except Exception as error:
            log.warning("%s: failed: %s", point.label, error)
            log.debug("", exc_info=error)
            return failed(task, error, warnings)
    answers = {DENSE: before.answers, stage: after.answers}
    return Row(
        task.id,
        point.settings,
        None,
        params,
        put_texts_beside({DENSE: before.perplexity, stage: after.perplexity}),
        by_task(answers),
        main_scores(answers),
        minutes,
        progress.seconds,
        list(warnings),
        point.method,
    )


def failed(task: Task, error: Exception, warnings: Sequence[str] = ()) -> Row:
    """Return the row of a point that failed."""
    message = f"{type(error).__name__}: {error}"
    return Row(task.id, task.point.settings, message, warnings=list(warnings), method=task.point.method)


def _prune(
    task: Task, dense: Dense, runtime: Runtime, statistics: Statistics | None
) -> tuple[PreTrainedModel, PruningPlan, float]:
    """Search, repair, slice and train; return the model, its plan, and the minutes that this took."""
    recipe, progress = task.point.recipe, runtime.progress
    model = copy_sharing_weights(dense.model, dense.target.sites)
    executor = task.executor(model, dense, runtime, statistics)
    budget = open_budget(recipe, dense.target, dense.params, dense.saved).budget

    def searched() -> dict[str, Any]:
        start = progress.total
        plan = search(executor, recipe.method, budget, sequential=task.sequential).plan
        return {"plan": plan.to_json(), "seconds": progress.total - start}

    # Its time counts for every point that uses it.
    known = dense.store.figures(f"plan {task.search_key(dense)}", dict[str, Any], searched)
    plan, start = PruningPlan.from_json(known["plan"]), progress.total
    repair_(executor, recipe.method, plan, sequential=task.sequential)
    recovery = recovery_of(recipe.compensators)
    if recovery is not None:
        model = _train(model, recovery, task, dense, runtime)
    return model, plan, round((known["seconds"] + progress.total - start) / 60, 3)


def _train(model: PreTrainedModel, recovery: Recovery, task: Task, dense: Dense, runtime: Runtime) -> PreTrainedModel:
    """Train a copy of a pruned model, which shares what was not sliced with the dense model."""
    assert task.text.recovery is not None
    student = WholeStudent(copy.deepcopy(model), recovery.merge, dense.saved)
    teacher = dense.model if recovery.training.distill else None
    recovered = recover_(student.model, dense.target.sites, recovery, task.text.recovery, runtime, teacher=teacher)
    student.finish(recovered)
    return student.model
