"""What a stopped run has left, and the cache of statistics, damaged: found as written, or refused, or made anew."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import DAMAGE, VALUES, cases, damaged, header_of, read, tampered, with_header
from hypothesis import example, given
from hypothesis import strategies as st
from runs import make_sites
from torch import Tensor

from flapkit.execution.cache import Calibrated, clear, entries, read_statistic, write_statistic
from flapkit.execution.executor import record_of
from flapkit.execution.record_files import OtherFormatError, RecordError, read_record
from flapkit.execution.resume import ResumeStore
from flapkit.execution.stream import HiddenStates
from flapkit.execution.training import Workplace
from flapkit.model.surgery import Correction
from flapkit.pruning.algorithm import Repairs
from flapkit.pruning.moments import Moments
from flapkit.system.workdir import WorkDir, open_workdir

SITES = make_sites(1)
ASKED = {"recipe": {"model": {"path": "a"}, "budget": {"ratio": 0.2}}, "overrides": []}
FIGURES = {"text, 128 tokens": [4.0, 1.5, 8], "other": [5.0, None, 1]}
KIND = dict[str, tuple[float, float | None, int]]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> WorkDir:
    """The work folder of a run that goes on."""
    work = WorkDir(tmp_path_factory.mktemp("work") / "out", resumed=True)
    work.folder.mkdir()
    return work


def never() -> Any:
    raise AssertionError("it was there, and is made anew")


def measured(seed: int = 0) -> dict[str, Moments]:
    torch.manual_seed(seed)
    found = {site.name: Moments.of(site) for site in SITES}
    for site in SITES:
        found[site.name].update(torch.randn(8, site.channels))
    return found


def same(found: dict[str, Tensor], before: dict[str, Tensor]) -> bool:
    return found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)


def changed(content: bytes) -> st.SearchStrategy[bytes]:
    """Change bytes of a safetensors file, or its header."""
    header, data = header_of(content)
    odd = st.sampled_from(["F32", "F64", "I8", [0, 8], [2], [-1], [2**62]])
    return DAMAGE.map(lambda damage: damaged(content, damage)) | tampered(header, odd | VALUES).map(
        lambda tree: with_header(tree, data)
    )


REPAIR = Repairs({"a": Correction(torch.randn(3, 2), torch.zeros(3), "kept"), "b": Correction(None, None)}, {"a": 0.5})


def test_a_piece_that_was_damaged(work):
    kept = ResumeStore(work)
    kept.find("repair", lambda: record_of(REPAIR))
    path, piece = work.path("repair.safetensors"), record_of(REPAIR)

    @cases(160)
    @given(changed(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        found = read(lambda: kept.find("repair", never), str(path))
        if found is not None:
            assert same(dict(found.tensors), dict(piece.tensors))
            assert found.metadata == piece.metadata

    check()


@cases(120)
@given(tampered(FIGURES).map(json.dumps) | DAMAGE.map(lambda damage: damaged(json.dumps(FIGURES).encode(), damage)))
@example("[" * 100_000)
@example('{"a": [1, null, ' + "9" * 5000 + "]}")
def test_figures_that_were_damaged(work, content):
    path = work.path("perplexity.json")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read(lambda: ResumeStore(work).figures("perplexity", KIND, never), str(path))
    for name, (perplexity, bits, size) in (found or {}).items():
        assert isinstance(name, str)
        assert isinstance(perplexity, float)
        assert bits is None or isinstance(bits, float)
        assert isinstance(size, int)


@cases(120)
@given(
    tampered({"settings": ASKED, "inputs": {"texts": {"a": "b"}}}).map(json.dumps)
    | DAMAGE.map(lambda damage: damaged(json.dumps({"settings": ASKED}).encode(), damage))
)
def test_what_was_asked_that_was_damaged(tmp_path_factory, content):
    output = tmp_path_factory.getbasetemp() / "asked" / "out"
    work = WorkDir(output)
    work.folder.mkdir(parents=True, exist_ok=True)
    work.path("piece.safetensors").touch()
    work.path("settings.json").write_bytes(content if isinstance(content, bytes) else content.encode())

    def go_on() -> bool:
        with open_workdir(output, ASKED, resume=True) as resumed:
            resumed.claim({"texts": {"a": "b"}})
        return True

    read(go_on, "asked")
    assert work.path("piece.safetensors").exists()


def test_a_training_that_was_damaged(tmp_path):
    workplace = Workplace(tmp_path / "recovery", ASKED)
    workplace.open()
    torch.save({"state_dict": {"a": torch.zeros(4)}, "step": 3, "callbacks": {}}, workplace.checkpoint)
    contents = {path: path.read_bytes() for path in (workplace.checkpoint, workplace.folder / "training.json")}

    @cases(160)
    @given(st.sampled_from([*contents]), DAMAGE)
    def check(path, damage):
        for each, content in contents.items():
            each.write_bytes(damaged(content, damage) if each == path else content)
        found = read(workplace.open, str(path))
        assert found in (None, workplace.checkpoint)

    check()


def test_hidden_states_that_were_damaged(tmp_path):
    hidden = HiddenStates(tmp_path)
    hidden.put(0, torch.ones(2, 3))
    hidden.advance()
    (path,) = tmp_path.rglob("*.safetensors")

    @cases(80)
    @given(changed(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        found = read(lambda: hidden[0], str(path))
        assert found is None or isinstance(found, Tensor)

    check()


@pytest.fixture
def unheard(monkeypatch) -> Callable[[], list[str]]:
    """Gather what the cache warns of, and show it to nobody."""
    said: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("flapkit.execution.cache"), "warning", lambda text, *parts: said.append(text % parts)
    )
    return lambda: said


def of_other_format(path: Path) -> bool:
    try:
        read_record(path)
    except (OtherFormatError, RecordError) as error:
        return isinstance(error, OtherFormatError)
    return False


def test_a_cached_statistic_that_was_damaged(tmp_path, unheard):
    calibrated, before = Calibrated(tuple(SITES), "ab", {"model": "m"}), measured()
    write_statistic(tmp_path, calibrated, Moments, before)
    path = calibrated.file(tmp_path, Moments)

    @cases(160)
    @given(changed(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        unheard().clear()
        found = read_statistic(tmp_path, calibrated, Moments, lambda site: torch.device("cpu"))
        for name, each in (found or {}).items():
            assert same(each.state, before[name].state)
        assert bool(unheard()) == (found is None and not of_other_format(path))
        (entry,) = entries(tmp_path)
        assert isinstance(entry.statistic + entry.model, str)

    check()
    clear(tmp_path)
    assert entries(tmp_path) == []
