"""Run lm-eval on a model in memory. Importing lm-eval takes seconds: import this module only where it is used."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import lm_eval.api.task
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from flapkit.evaluation.batch_size import first_batch_size, halving
from flapkit.evaluation.local_tasks import LocalTask
from flapkit.evaluation.scores import BatchSize, Score, TaskScores
from flapkit.model.positions import context_length, table_length
from flapkit.system.errors import DataError, RunError, did_you_mean
from flapkit.system.sizes import counted
from flapkit.text.tokenise import tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEW_SHOT_SEED = 1234
"""Seed for drawing few-shot examples; lm-eval's default."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Harness:
    """Loaded tasks, to score any number of models on.

    Args:
        tasks: name -> lm-eval's task.
        sources: name -> the local file of its rows, or lm-eval's own dataset.
        limit: items per task; None for all.
        batch_size: requests per batch, or ``auto``.
    """

    tasks: Mapping[str, Any]
    sources: Mapping[str, str]
    limit: int | None
    batch_size: BatchSize

    @classmethod
    def load(
        cls, names: Sequence[str], local: Mapping[str, LocalTask], limit: int | None, batch_size: BatchSize
    ) -> Harness:
        """Load tasks: those of ``local`` from their files, the others through lm-eval.

        Raises:
            DataError: a task is unknown, or its rows cannot be loaded.
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
        """Number of items of all tasks."""
        return sum(self._items(name) for name in self.tasks)

    @property
    def sha256(self) -> str:
        """Hash of the rows of all items, before any model answers them."""
        digest = hashlib.sha256()
        for name, task in self.tasks.items():
            digest.update(name.encode())
            for row in islice(task.eval_docs, self.limit):
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def evaluate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        advance: Callable[[int], None] = lambda _: None,
    ) -> dict[str, TaskScores]:
        """Score a model on every task.

        Args:
            model: the model, on its device and in evaluation mode.
            tokenizer: the model's tokenizer.
            advance: called with the number of further items done.

        Raises:
            RunError: the model, or lm-eval, fails on a task.
        """
        # A copy: lm-eval adds a padding token to the tokenizer, which must not be saved with a checkpoint.
        with _quiet():
            wrapper = _Model(model, copy.deepcopy(tokenizer), self.batch_size)
            return {name: self._score(name, wrapper, advance) for name in self.tasks}

    def check_answers(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ``DataError`` if an answer is longer than a model's context: lm-eval cuts questions, but no answers.

        Args:
            model: the model; one without memory will do.
            tokenizer: its tokenizer.
        """
        context = table_length(model) or context_length(model.config)
        if context is None:
            return
        for name in self.tasks:
            for number, answer in self._answers(name):
                # A token is at least a byte.
                if len(answer.encode()) <= context:
                    continue
                tokens = len(tokenise(tokenizer, answer, add_special_tokens=False)["input_ids"])
                if tokens > context:
                    raise DataError(
                        f"zero-shot task {name}: an answer of item {number} has {tokens} tokens, and the model's "
                        f"context has {context}; leave the task out, or evaluate a model with a longer context"
                    )

    def _answers(self, name: str) -> Iterator[tuple[int, str]]:
        """Yield the number of each item, and each of its answers that is scored as a whole."""
        task = self.tasks[name]
        if task.OUTPUT_TYPE not in ("loglikelihood", "multiple_choice"):
            return
        for number, row in enumerate(islice(task.eval_docs, self.limit)):
            requests = task.construct_requests(doc=row, ctx=[""] if getattr(task, "multiple_input", 0) else "")
            for request in requests if isinstance(requests, list) else [requests]:
                yield number, str(request.args[1])

    def _items(self, name: str) -> int:
        return min(len(self.tasks[name].eval_docs), self.limit or sys.maxsize)

    def _score(self, name: str, model: _Model, advance: Callable[[int], None]) -> TaskScores:
        model.begin(_ItemProgress(self._items(name), advance))
        try:
            results: Any = evaluate(lm=model, task_dict={"tasks": {name: self.tasks[name]}}, limit=self.limit)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise RunError(f"zero-shot task {name}: {str(error) or type(error).__name__}") from error
        if model.truncated:
            log.warning(
                "zero-shot: %s: %s cut off at the beginning, to the model's context of %d tokens",
                name,
                counted(model.truncated, "request was", "requests were"),
                model.max_length,
            )
        model.progress.finish()
        samples = results["samples"][name]
        return TaskScores(
            source=self.sources[name],
            items=len({sample["doc_id"] for sample in samples}),
            sha256=_hash(samples),
            few_shot=int(results["n-shot"][name]),
            truncated=model.truncated,
            scores=_scores(results["results"][name], samples),
        )


class _ItemProgress:
    """Estimates the items done from the requests answered; an item has several requests, and some share a forward pass.

    Args:
        items: items of the task.
        advance: called with the number of further items done.
    """

    def __init__(self, items: int, advance: Callable[[int], None]) -> None:
        self._items = items
        self._advance = advance
        self._answered = self._reported = 0
        self.requests = 0

    def answered(self, requests: int) -> None:
        """Count further requests as answered."""
        self._answered += requests
        self._report(self._items * min(self._answered, self.requests) // max(1, self.requests))

    def finish(self) -> None:
        """Report the remaining items."""
        self._report(self._items)

    def _report(self, done: int) -> None:
        if done > self._reported:
            self._advance(done - self._reported)
            self._reported = done


class _Model(HFLM):  # type: ignore[misc, unused-ignore]
    """lm-eval's model class with flapkit's batch size, and a count of requests longer than the context."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: BatchSize) -> None:
        context = table_length(model)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=context)
        self._chosen_batch_size = batch_size
        self.begin(_ItemProgress(0, lambda _: None))
        self.batch_size_per_gpu = self._first_size(self.max_length)

    def begin(self, progress: _ItemProgress) -> None:
        """Start a task."""
        self.truncated = 0
        self.progress = progress

    def _first_size(self, longest: int) -> int:
        return (
            first_batch_size(self.model, longest, self.device)
            if self._chosen_batch_size == "auto"
            else self._chosen_batch_size
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score continuations, without lm-eval's progress bar."""
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self.progress.answered(len(inps))
        return logits

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        self.progress.requests += len(requests)
        self.truncated += sum(length > self.max_length + 1 for length in lengths)
        score: Callable[..., list[tuple[float, bool]]] = super()._loglikelihood_tokens

        def with_size(sizes: Mapping[str, int]) -> list[tuple[float, bool]]:
            self.batch_size_per_gpu = sizes["requests"]
            return score(requests, disable_tqdm=True)

        longest = min(max(lengths, default=1), self.max_length)
        return halving({"requests": self._first_size(longest)}, with_size)[0]


def _official(names: Sequence[str]) -> dict[str, Any]:
    """Load lm-eval's own tasks by name."""
    if not names:
        return {}
    manager = TaskManager()
    # lm-eval would read an unknown name as a path, and a task's file can run code.
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise DataError(f"zero_shot.tasks: lm-eval has no task {unknown[0]!r}{_suggestion(unknown[0], manager)}")
    try:
        loaded: dict[str, Any] = manager.load(list(names))["tasks"]
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise DataError(
            f"zero_shot.tasks: {', '.join(names)}: cannot be loaded: {str(error).splitlines()[0]}; without a network, "
            "use the seven tasks of FLAP's paper from files in `data_dir`"
        ) from error
    return loaded


def _suggestion(name: str, manager: Any) -> str:
    # lm-eval has thousands of tasks: suggest the closest one only.
    return did_you_mean(name, manager.all_tasks).partition(" (known:")[0] + "; `lm-eval ls tasks` lists them all"


def _dataset_of(task: Any) -> str:
    parts = [task.config.dataset_path, task.config.dataset_name]
    return "lm-eval: " + " ".join(str(part) for part in parts if part)


def _scores(results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """Read lm-eval's ``metric,filter`` and ``metric_stderr,filter`` keys; the default filter is called ``none``."""
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
    """Hash the scored texts and the correct answers, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample["arguments"], sample["target"]], default=str).encode())
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval's log and progress bars; it has no option for the bar over a task's items."""
    logger, bar = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level = logger.level
    plain: Callable[..., Any] = lambda rows, **_: rows  # noqa: E731 - it replaces a class
    logger.setLevel(logging.ERROR)
    setattr(lm_eval.api.task, "tqdm", plain)  # noqa: B010 - typed as a class
    try:
        yield
    finally:
        logger.setLevel(level)
        setattr(lm_eval.api.task, "tqdm", bar)  # noqa: B010
