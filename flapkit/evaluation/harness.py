"""lm-eval around a model in memory. Imports lm-eval, which takes seconds: import this module where it is needed."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lm_eval.api.task
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flapkit.evaluation.batch_size import first_batch_size, halving
from flapkit.evaluation.local_tasks import LocalTask
from flapkit.evaluation.scores import BatchSize, Score, TaskScores
from flapkit.system.errors import DataError, RunError, did_you_mean

FEW_SHOT_SEED = 1234
"""Seed of lm-eval's drawing of solved examples; its own default."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Harness:
    """Tasks that are ready to be asked, as often as there are models.

    Args:
        tasks: name -> lm-eval's task.
        sources: name -> the local file of its rows, or lm-eval's own dataset.
        limit: items of each task; None for all.
        batch_size: requests at once; ``auto`` finds it.
    """

    tasks: Mapping[str, Any]
    sources: Mapping[str, str]
    limit: int | None
    batch_size: BatchSize

    @classmethod
    def load(
        cls, names: Sequence[str], local: Mapping[str, LocalTask], limit: int | None, batch_size: BatchSize
    ) -> Harness:
        """Load tasks: those of ``local`` from their files, the others as lm-eval does.

        Raises:
            DataError: a task is unknown, or its rows cannot be had.
        """
        tasks: dict[str, Any] = {}
        with _quiet():
            for name, task in local.items():
                tasks[name] = ConfigurableTask(config=task.config())
            tasks |= _official([name for name in names if name not in local])
            for task in tasks.values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=FEW_SHOT_SEED)
        sources = {name: str(local[name].path) if name in local else _dataset_of(task) for name, task in tasks.items()}
        return cls(tasks, sources, limit, batch_size)

    @property
    def items(self) -> int:
        """How many items are asked in all."""
        return sum(self._items(name) for name in self.tasks)

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        advance: Callable[[int], None] = lambda _: None,
    ) -> dict[str, TaskScores]:
        """Score a model on every task, one after another.

        Args:
            model: where it is, in evaluation mode.
            tokenizer: the model's.
            advance: called with how many more items are done.

        Raises:
            RunError: the model, or lm-eval, fails on a task.
        """
        # A copy: lm-eval gives tokenizers a padding token, which a checkpoint must not inherit.
        with _quiet():
            harnessed = _Model(model, copy.deepcopy(tokenizer), self.batch_size)
            return {name: self._score(name, harnessed, advance) for name in self.tasks}

    def _items(self, name: str) -> int:
        return min(len(self.tasks[name].eval_docs), self.limit or sys.maxsize)

    def _score(self, name: str, model: _Model, advance: Callable[[int], None]) -> TaskScores:
        model.begin(_Share(self._items(name), advance))
        try:
            found: Any = evaluate(lm=model, task_dict={"tasks": {name: self.tasks[name]}}, limit=self.limit)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise RunError(f"zero-shot task {name}: {error or type(error).__name__}") from error
        if model.truncated:
            log.warning(
                "zero-shot: %s: %d requests are longer than the model's context of %d tokens and lose their beginning",
                name,
                model.truncated,
                model.max_length,
            )
        model.share.finish()
        samples = found["samples"][name]
        return TaskScores(
            source=self.sources[name],
            items=len({sample["doc_id"] for sample in samples}),
            sha256=_hash(samples),
            few_shot=int(found["n-shot"][name]),
            truncated=model.truncated,
            scores=_scores(found["results"][name], samples),
        )


class _Share:
    """Tells how many items are done, by the requests that are answered: an item is a few, and some are answered as one.

    Args:
        items: items of the task.
        advance: called with how many more are done.
    """

    def __init__(self, items: int, advance: Callable[[int], None]) -> None:
        self._items = items
        self._advance = advance
        self._answered = self._told = 0
        self.requests = 0

    def answered(self, requests: int) -> None:
        """Take in that so many more requests are answered."""
        self._answered += requests
        self._tell(self._items * min(self._answered, self.requests) // max(1, self.requests))

    def finish(self) -> None:
        """Tell of what is left."""
        self._tell(self._items)

    def _tell(self, done: int) -> None:
        if done > self._told:
            self._advance(done - self._told)
            self._told = done


class _Model(HFLM):  # type: ignore[misc, unused-ignore]
    """lm-eval's own model class, with our batch size, and with a count of what does not fit the context."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: BatchSize) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
        self._asked = batch_size
        self.begin(_Share(0, lambda _: None))
        self.batch_size_per_gpu = self._first_size(self.max_length)

    def begin(self, share: _Share) -> None:
        """Begin a task."""
        self.truncated = 0
        self.share = share

    def _first_size(self, longest: int) -> int:
        return first_batch_size(self.model, longest, self.device) if self._asked == "auto" else self._asked

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score continuations, without lm-eval's bar."""
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self.share.answered(len(inps))
        return logits

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        self.share.requests += len(requests)
        self.truncated += sum(length > self.max_length + 1 for length in lengths)
        score: Callable[..., list[tuple[float, bool]]] = super()._loglikelihood_tokens

        def with_size(sizes: Mapping[str, int]) -> list[tuple[float, bool]]:
            self.batch_size_per_gpu = sizes["requests"]
            return score(requests, disable_tqdm=True)

        longest = min(max(lengths, default=1), self.max_length)
        return halving({"requests": self._first_size(longest)}, with_size)[0]


def _official(names: Sequence[str]) -> dict[str, Any]:
    """Load tasks of lm-eval's own, by name."""
    if not names:
        return {}
    manager = TaskManager()
    # lm-eval would take a path for an unregistered name, and a task's file can run code.
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise DataError(f"zero_shot.tasks: lm-eval has no task {unknown[0]!r}{_suggestion(unknown[0], manager)}")
    try:
        loaded: dict[str, Any] = manager.load(list(names))["tasks"]
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise DataError(
            f"zero_shot.tasks: {', '.join(names)}: cannot be loaded: {str(error).splitlines()[0]}; where there is no "
            "network, give the seven tasks of FLAP's paper as files in `data_dir`"
        ) from error
    return loaded


def _suggestion(name: str, manager: Any) -> str:
    # lm-eval knows thousands of tasks: the close one is said, the list is not.
    return did_you_mean(name, manager.all_tasks).partition(" (known:")[0] + "; `lm-eval ls tasks` lists them all"


def _dataset_of(task: Any) -> str:
    parts = [task.config.dataset_path, task.config.dataset_name]
    return "lm-eval: " + " ".join(str(part) for part in parts if part)


def _scores(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """Read lm-eval's ``metric,filter`` and ``metric_stderr,filter`` keys; its usual filter is called ``none``."""
    scores = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = results.get(f"{metric}_stderr,{kind}")
        items = [sample[metric] for sample in samples if sample["filter"] == kind and metric in sample]
        scores[metric if kind == "none" else key] = Score(
            float(value),
            float(stderr) if isinstance(stderr, (int, float)) else None,
            tuple(map(float, items)) if all(isinstance(item, (bool, int, float)) for item in items) else (),
        )
    return scores


def _hash(samples: Sequence[Mapping[str, Any]]) -> str:
    """Hash the texts that are scored and the right answers, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample["arguments"], sample["target"]], default=str).encode())
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's advice and bars to itself: it has no switch for the bar over a task's items."""
    logger, bar = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level = logger.level
    plain: Callable[..., Any] = lambda rows, **_: rows  # noqa: E731 - it stands in for a class
    logger.setLevel(logging.ERROR)
    setattr(lm_eval.api.task, "tqdm", plain)  # noqa: B010 - typed as a class
    try:
        yield
    finally:
        logger.setLevel(level)
        setattr(lm_eval.api.task, "tqdm", bar)  # noqa: B010
