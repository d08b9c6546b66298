"""The files beside a pruned model, changed by somebody: what is wrong is known before a recovery is trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import make_llama, write_recipe
from fuzzing import DAMAGE, VALUES, cases, cut_, damaged, put_back, read, tampered, to_bytes
from hypothesis import example, given
from hypothesis import strategies as st
from runs import make_run

import flapkit
from flapkit.checkpoint.card import CARD, licence_of, model_card
from flapkit.evaluation.zero_shot import add_scores
from flapkit.recipe.load import LoadedRecipe, load_recipe
from flapkit.run.checkpoint_files import Origin, plan_of
from flapkit.run.recover import RecoveryRecord, _files, _metadata
from flapkit.system.errors import InputError

RUN = make_run(layers=2)
TEXT = "text.txt, 32 tokens"
FIGURES = {
    "dense": 4.0,
    "pruned": 5.0,
    "bits_per_byte": {"dense": 1.5, "pruned": None},
    "batch_size": {"dense": 8, "pruned": 8},
    "protocol": {"length": 128},
}
MARK = {
    "versions": {"flapkit": "1"},
    "files": ["notes/a.txt", "result.json", "report.json", "recipe.yaml"],
    "model": {"path": "models/tiny", "revision": None},
    **RUN.made,
    "params": {"dense": 1},
}
FILES: dict[str, Any] = {
    "flapkit.json": MARK,
    "result.json": {**RUN.result, "perplexity": {TEXT: FIGURES}},
    "report.json": json.loads(RUN.record.to_json()),
    "plan.json": {},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "pruned"
    model = make_llama(num_hidden_layers=1)
    flapkit.save(model, folder, cut_(model), files={"notes/a.txt": "a"})
    FILES["plan.json"] = json.loads((folder / "plan.json").read_text())
    for name in ("flapkit.json", "result.json", "report.json"):
        (folder / name).write_text(json.dumps(FILES[name]))
    write_recipe(folder)
    (folder.parent / "outside.txt").write_text("a secret")
    return folder


@pytest.fixture(scope="module")
def recipe(checkpoint) -> LoadedRecipe:
    changes = ["evaluate={}", "compensator=[bias, lora]"]
    recipe = load_recipe(str(checkpoint / "recipe.yaml"), changes)
    # What was measured is known if the recipes measure the same.
    write_recipe(checkpoint, evaluate=recipe.recipe.evaluate.model_dump(mode="json"))
    return recipe


def examine(checkpoint: Path, name: str, content: str | bytes, recipe: LoadedRecipe) -> None:
    """Read a pruned folder as a recovery does, and write what it writes at its end."""
    with put_back(checkpoint / name, content):
        origin = read(lambda: Origin.of(checkpoint), name.removesuffix(".json"))
        known = origin and read(lambda: origin.known(recipe.recipe, [TEXT]), name)
    if not origin or known is None:
        return
    for carried in origin.carried.values():
        assert carried.absolute().is_relative_to(checkpoint.absolute())
        assert ".." not in carried.parts
    record = RecoveryRecord(
        checkpoint.parent / "again",
        known.get("params", {}),
        known.get("costs", []),
        {text: {**figures, "recovered": 4.5} for text, figures in known.get("perplexity", {}).items()},
        add_scores(known.get("zero_shot", {}), "recovered", {}),
        {"best_step": 1},
        {**known.get("seconds", {}), "recover": 1.0},
        [*known.get("warnings", []), "x"],
    )
    for figures in known.get("perplexity", {}).values():
        assert all(isinstance(figures[part], dict) for part in ("bits_per_byte", "batch_size"))
    _files(record, SimpleNamespace(recipe=recipe), origin, checkpoint.parent / "logs")
    made = _metadata(record, recipe, origin)
    base = made.get("model", {}).get("path") or ""
    model_card("again", base, metadata=made, result=record.result(), recipe="")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_changed(checkpoint, recipe, name):
    @cases(120)
    @given(tampered(FILES[name]))
    def check(tree):
        examine(checkpoint, name, json.dumps(tree), recipe)

    check()


@cases(120)
@given(st.sampled_from([*FILES, "recipe.yaml"]), DAMAGE)
def test_bytes_that_were_changed(checkpoint, recipe, name, damage):
    examine(checkpoint, name, damaged((checkpoint / name).read_bytes(), damage), recipe)


CHANGES = {
    "flapkit.json": [
        {**MARK, "files": ["../outside.txt"]},
        {**MARK, "files": ["/etc/passwd"]},
        {**MARK, "files": ["notes/../../outside.txt"]},
        {**MARK, "files": ["C:\\outside.txt"]},
        {**MARK, "files": "notes"},
        {**MARK, "files": {"a": 1}},
        {**MARK, "model": "models/tiny"},
        {**MARK, "metric": {"nam": "wifv"}},
    ],
    "result.json": [
        {**FILES["result.json"], "perplexity": {TEXT: {"pruned": 5.0}}},
        {**FILES["result.json"], "perplexity": {TEXT: {**FIGURES, "batch_size": 8}}},
        {key: value for key, value in FILES["result.json"].items() if key != "params"},
    ],
    "report.json": ["{", "[]", {"model": "x"}],
}


@pytest.mark.parametrize(("name", "change"), [(name, each) for name, changes in CHANGES.items() for each in changes])
def test_what_cannot_be_used_is_known_before(checkpoint, recipe, name, change):
    with (
        put_back(checkpoint / name, change if isinstance(change, str) else json.dumps(change)),
        pytest.raises(InputError, match=name),
    ):
        Origin.of(checkpoint).known(recipe.recipe, [TEXT])


def test_what_is_whole_is_used(checkpoint, recipe):
    """The cases begin with a folder that can be recovered."""
    origin = Origin.of(checkpoint)
    assert origin.known(recipe.recipe, [TEXT])["perplexity"] == {TEXT: FIGURES}
    assert "perplexity" not in origin.known(recipe.recipe, ["another"])
    examine(checkpoint, "plan.json", (checkpoint / "plan.json").read_bytes(), recipe)


def test_a_checkpoint_without_a_plan_is_named(checkpoint):
    for content in (b"\xff", b"[" * 100_000, b"", b"{}"):
        with put_back(checkpoint / "plan.json", content):
            for reader in (plan_of, flapkit.load):
                with pytest.raises(InputError, match=r"plan"):
                    reader(checkpoint)
    assert math.isfinite(sum(map(len, plan_of(checkpoint).keep.values())))


HEADER = {"license": "mit", "tags": ["a"], "model-index": [{"name": "x", "results": []}]}


@cases(120)
@given(tampered(HEADER, VALUES).map(yaml.safe_dump) | st.text(max_size=40) | st.binary(max_size=30), st.booleans())
@example("- a", True)
@example("&a [*a]", True)
@example(b"\xff", True)
def test_a_card_of_the_dense_model_that_was_changed(tmp_path_factory, header, closed):
    """Its licence is named where the pruned model is saved."""
    folder = tmp_path_factory.getbasetemp() / "card"
    folder.mkdir(exist_ok=True)
    (folder / CARD).write_bytes(b"---\n" + to_bytes(header) + (b"\n---\n" if closed else b""))
    licence = licence_of(str(folder))
    assert licence is None or isinstance(licence, str)
    model_card("x", str(folder), metadata={}, result=None, recipe=None)


@cases(40)
@given(st.text(max_size=20) | st.sampled_from(["a" * 300, "~nobody-of-this-name/x", "\0", "a/" * 3000, "a/b"]))
def test_a_name_of_the_dense_model_that_is_none(name):
    model_card("x", name, metadata={}, result=None, recipe=None)
