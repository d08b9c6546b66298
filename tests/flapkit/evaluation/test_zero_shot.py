"""lm-eval on a model in memory: its scores, and the prompts that local rows become."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from flapkit.evaluation.local_tasks import TASKS, find_task
from flapkit.evaluation.scores import Score, TaskScores
from flapkit.evaluation.zero_shot import load_harness, side_by_side
from flapkit.system.errors import DataError, InputError, RunError

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra zeroshot")

ROWS: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"query": "Question: def add(a, b):\n", "choices": ["return a + b", "return"], "gold": 0},
        {"query": "Question: import\n", "choices": ["os, sys and what else there is", "x = 3"], "gold": 0},
        {"query": "Question: for i in\n", "choices": ["12", "range(10):"], "gold": 1},
    ],
    "winogrande": [
        {"context_options": ["if x: return", "while: return"], "continuation": "None", "gold": 0},
        {"context_options": ["self.assert", "raise Value"], "continuation": "Error(x)", "gold": 1},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def model():
    from flapkit.checkpoint.load import load

    return load("builtin:tiny-llama", "float32")


@pytest.fixture(scope="module")
def tokenizer():
    from flapkit.checkpoint.load import load_tokenizer

    return load_tokenizer("builtin:tiny-llama")


def log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    """The continuation's log-probability, token by token, without lm-eval."""
    whole = tokenizer(context + continuation)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logs = model(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
    return float(sum(logs[place - 1, whole[place]] for place in range(start, len(whole))))


@needs_harness
@pytest.mark.parametrize("batch_size", ["auto", 1, 3])
def test_the_scores_are_the_likelihoods_own(model, tokenizer, folder: Path, batch_size: Any) -> None:
    harness = load_harness(list(ROWS), data_dir=folder, batch_size=batch_size)
    assert harness.items == 5
    found = harness.evaluate(model, tokenizer)
    right, normed = [], []
    for row in ROWS["piqa"]:
        logs = [log_likelihood(model, tokenizer, f"{row['query']}Answer:", f" {choice}") for choice in row["choices"]]
        right.append(float(logs.index(max(logs)) == row["gold"]))
        by_length = [log / len(choice) for log, choice in zip(logs, row["choices"], strict=True)]
        normed.append(float(by_length.index(max(by_length)) == row["gold"]))
    assert found["piqa"].scores["acc"].items == tuple(right)
    assert found["piqa"].scores["acc_norm"].items == tuple(normed)
    either = []
    for row in ROWS["winogrande"]:
        logs = [log_likelihood(model, tokenizer, text, f" {row['continuation']}") for text in row["context_options"]]
        either.append(float(logs.index(max(logs)) == row["gold"]))
    assert found["winogrande"].scores["acc"].items == tuple(either)
    assert found["winogrande"].scores["acc"].value == sum(either) / 2
    assert "acc_norm" not in found["winogrande"].scores


OFFICIAL: dict[str, dict[str, Any]] = {
    "boolq": {"passage": "Tea -- Tea is hot.", "question": "is tea hot", "label": 1, "idx": 0},
    "piqa": {"goal": "Make tea.", "sol1": "Boil water.", "sol2": "Boil tea.", "label": 0},
    "hellaswag": {
        "activity_label": "Tea",
        "ctx_a": "[header] How to make tea [title] Boil water.",
        "ctx_b": "",
        "endings": ["[title] Pour  it.", "Drink it [substeps] cold."],
        "label": "1",
    },
    "winogrande": {"sentence": "Tea beats milk since _ is hot.", "option1": "tea", "option2": "milk", "answer": "2"},
    "arc_easy": {
        "question": "What is hot?",
        "choices": {"text": ["tea", "ice"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "arc_challenge": {
        "question": "What is cold?",
        "choices": {"text": ["tea", "ice", "air"], "label": ["1", "2", "3"]},
        "answerKey": "3",
    },
    "openbookqa": {
        "question_stem": "Tea is",
        "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
        "answerKey": " B",
    },
}
"""A row of each task as it is on the hub; made up."""

LOCAL: dict[str, dict[str, Any]] = {
    "boolq": {"query": "Passage: Tea -- Tea is hot.\nQuestion: is tea hot?", "choices": ["no", "yes"], "gold": 1},
    "piqa": {"query": "Question: Make tea.\n", "choices": ["Boil water.", "Boil tea."], "gold": 0},
    "hellaswag": {
        "query": "Tea: [header] How to make tea [title] Boil water.",
        "choices": ["[title] Pour  it.", "Drink it [substeps] cold."],
        "gold": 1,
    },
    "winogrande": {
        "context_options": ["Tea beats milk since tea", "Tea beats milk since milk"],
        "continuation": "is hot.",
        "gold": 1,
    },
    "arc_easy": {"query": "Question: What is hot?", "choices": ["tea", "ice"], "gold": 1},
    "arc_challenge": {"query": "Question: What is cold?", "choices": ["tea", "ice", "air"], "gold": 2},
    "openbookqa": {"query": "Tea is", "choices": ["hot", "cold"], "gold": 1},
}
"""The same rows as local files hold them."""


def requests_of(task: Any) -> tuple[list[Any], Any, list[str]]:
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=None)
    doc = task.eval_docs[0]
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return [instance.args for instance in task.instances], int(gold), sorted(task.aggregation())


@needs_harness
def test_local_rows_become_the_official_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folders = ("super_glue/boolq", "piqa", "hellaswag", "winogrande", "arc", "openbookqa")
    shipped = Path(lm_eval.tasks.__file__).parent
    manager = TaskManager(include_path=[shipped / name for name in folders], include_defaults=False)
    for name in TASKS:
        rows = datasets.Dataset.from_list([OFFICIAL[name]])
        splits = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, splits=splits, **__: splits)
        official = manager.load([name])["tasks"][name]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(LOCAL[name]), encoding="utf-8")
        local = load_harness([name], data_dir=tmp_path).tasks[name]
        assert requests_of(local) == requests_of(official), name


@needs_harness
def test_the_same_questions_have_the_same_hash(model, tokenizer, folder: Path) -> None:
    def hash_of(limit: int | None) -> str:
        return load_harness(["piqa"], data_dir=folder, limit=limit).evaluate(model, tokenizer)["piqa"].sha256

    assert hash_of(None) == hash_of(3) != hash_of(2)


@needs_harness
def test_what_does_not_fit_the_context_is_counted(tokenizer, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    from conftest import make_llama

    caplog.set_level("WARNING", "flapkit")
    short = make_llama(vocab_size=len(tokenizer), max_position_embeddings=12)
    found = load_harness(["piqa"], data_dir=folder).evaluate(short, tokenizer)["piqa"]
    assert found.truncated > 0
    assert f"{found.truncated} requests were cut off at the beginning, to the model's context of 12" in caplog.text


@needs_harness
def test_an_answer_longer_than_the_context_is_known_before_anything_runs(tokenizer, folder: Path) -> None:
    from conftest import make_llama

    harness, answer = load_harness(list(ROWS), data_dir=folder), ROWS["piqa"][1]["choices"][0]
    tokens = len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"])
    harness.check_answers(make_llama(vocab_size=len(tokenizer), max_position_embeddings=tokens), tokenizer)
    short = make_llama(vocab_size=len(tokenizer), max_position_embeddings=tokens - 1)
    with pytest.raises(DataError, match=f"piqa: an answer of item 1 has {tokens} tokens.*context has {tokens - 1}"):
        harness.check_answers(short, tokenizer)
    # Nor is the message empty where it is asked nevertheless.
    with pytest.raises(RunError, match="zero-shot task piqa: AssertionError"):
        harness.evaluate(short, tokenizer)


@needs_harness
def test_the_tokenizer_stays_as_it_was(model, tokenizer, folder: Path) -> None:
    before = tokenizer.pad_token, len(tokenizer)
    load_harness(["piqa"], data_dir=folder).evaluate(model, tokenizer)
    assert (tokenizer.pad_token, len(tokenizer)) == before


@needs_harness
def test_it_tells_of_every_item(model, tokenizer, folder: Path) -> None:
    told: list[int] = []
    harness = load_harness(list(ROWS), data_dir=folder, batch_size=1)
    harness.evaluate(model, tokenizer, told.append)
    assert sum(told) == harness.items == 5
    assert len(told) > 2


def test_a_missing_extra_says_what_to_install(without: Callable[..., None], folder: Path) -> None:
    without("lm_eval")
    with pytest.raises(InputError, match=r'pip install "flapkit\[zeroshot\]"'):
        load_harness(["piqa"], data_dir=folder)


@needs_harness
@pytest.mark.slow
def test_an_unknown_task_and_one_without_a_network() -> None:
    with pytest.raises(DataError, match=r"lm-eval has no task 'boolqq'; did you mean 'boolq'"):
        load_harness(["boolqq"])
    # A path would run what the file says.
    with pytest.raises(DataError, match=r"lm-eval has no task '\./mine\.yaml'"):
        load_harness(["./mine.yaml"])
    with pytest.raises(DataError, match=r"boolq: cannot be loaded: .*`data_dir`"):
        load_harness(["boolq"])


def scores(**metrics: tuple[float, ...]) -> TaskScores:
    found = {name: Score(sum(items) / len(items), 0.1, items) for name, items in metrics.items()}
    return TaskScores("rows.jsonl", 4, "hash", 0, 0, found)


def test_side_by_side() -> None:
    pytest.importorskip("scipy")
    dense, pruned = {"piqa": scores(acc=(1.0, 1.0, 0.0, 1.0))}, {"piqa": scores(acc=(1.0, 0.0, 0.0, 0.0))}
    found = side_by_side(dense, pruned)["piqa"]
    assert (found["items"], found["sha256"]) == (4, "hash")
    assert found["metrics"]["acc"]["dense"] == {"value": 0.75, "stderr": 0.1}
    assert found["metrics"]["acc"]["paired"]["only_first"] == 2
    assert found["metrics"]["acc"]["paired"]["p_value"] == 0.5


def test_what_is_not_right_or_wrong_is_not_paired() -> None:
    tasks = {"lambada": scores(perplexity=(3.2, 5.5))}
    assert "paired" not in side_by_side(tasks, tasks)["lambada"]["metrics"]["perplexity"]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_a_local_form(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(LOCAL[name]), encoding="utf-8")
    assert find_task(name, tmp_path).config()["metric_list"][0]["metric"] == "acc"
