"""What the statistics cache guarantees: the same figures or a new measurement, and never a stale one."""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import sys

import pytest
import torch
from conftest import largest_file, make_llama

import flapkit
from flapkit.checkpoint import weights
from flapkit.checkpoint.weights import remove_abandoned, write_tensors
from flapkit.execution.cache import Calibrated, clear, entries, read_statistic, write_statistic
from flapkit.execution.executor import CalibrationText
from flapkit.execution.lightning.data import PruningData
from flapkit.execution.record_files import FORMAT
from flapkit.execution.runtime import Runtime
from flapkit.execution.whole import WholeExecutor
from flapkit.pruning.collector import measure
from flapkit.pruning.gram import Gram, HeldOutGram
from flapkit.pruning.moments import Moments
from flapkit.system.paths import cache_folder

RUNTIME = Runtime({"accelerator": "cpu", "devices": 1})
CPU = torch.device("cpu")


def calibrated(model, tokens, numerics="cpu 32-true", sites=None):
    return Calibrated.of(model, sites or flapkit.sites(model), PruningData(tokens).calibration_rows(), numerics)


def find(model, tokens, cache, *statistics, batch_size=8):
    text = CalibrationText(tokens, batch_size)
    return WholeExecutor(model, flapkit.sites(model), text, RUNTIME, cache=cache).calibrate(statistics)


def test_found_again_without_a_forward_pass(tokens, cache, forwards):
    first = find(make_llama(), tokens, cache, Moments)
    ran = len(forwards)
    again = find(make_llama(), tokens, cache, Moments)
    assert (ran, len(forwards)) == (3, 3)
    for site in first:
        for state in ("_tokens", "_mean", "_squares"):
            assert torch.equal(getattr(first[site][Moments], state), getattr(again[site][Moments], state))


def test_only_what_is_missing_is_measured(tokens, cache, forwards):
    find(make_llama(), tokens, cache, Moments)
    both = find(make_llama(), tokens, cache, Moments, Gram)
    assert len(forwards) == 6
    assert {len(statistics) for statistics in both.values()} == {2}
    find(make_llama(), tokens, cache, Gram)
    assert len(forwards) == 6


def test_without_a_cache_nothing_is_kept(tokens, cache, forwards):
    find(make_llama(), tokens, None, Moments)
    find(make_llama(), tokens, None, Moments)
    assert len(forwards) == 6
    assert entries(cache) == []


def test_a_restored_statistic_computes_without_a_warning(tokens, cache):
    model = make_llama()
    find(model, tokens, cache, Moments)
    restored = find(model, tokens, cache, Moments)
    expected = measure(model, flapkit.sites(model), [Moments], [{"input_ids": tokens}])
    for site, statistics in restored.items():
        torch.testing.assert_close(statistics[Moments].variance, expected[site][Moments].variance)


@pytest.mark.parametrize("change", ["weight", "dtype", "config", "attention", "numerics", "tokens", "mask", "sites"])
def test_the_key_changes_with(change, tokens):
    model = make_llama()
    key = calibrated(model, tokens).digest
    assert calibrated(make_llama(), tokens.clone()).digest == key
    other, sites, numerics, rows = make_llama(), flapkit.sites(model), "cpu 32-true", tokens.clone()
    if change == "weight":
        with torch.no_grad():
            other.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    elif change == "dtype":
        other = other.to(torch.bfloat16)
    elif change == "config":
        other.config.rms_norm_eps = 1e-3
    elif change == "attention":
        other.set_attn_implementation("eager")
    elif change == "numerics":
        numerics = "cpu bf16-mixed"
    elif change == "tokens":
        rows[5, 7] += 1
    elif change == "mask":
        assert Calibrated.of(other, sites, masked(rows), numerics).digest != key
        return
    else:
        sites = sites[:-1]
    assert calibrated(other, rows, numerics, sites).digest != key


def masked(tokens):
    for row in PruningData(tokens).calibration_rows():
        yield {**row, "attention_mask": torch.ones_like(row["input_ids"])}


def test_the_batch_size_is_no_part_of_the_key(tokens, cache, forwards):
    model = make_llama()
    find(model, tokens, cache, Moments)
    ran = len(forwards)
    find(model, tokens, cache, Moments, batch_size=5)
    assert len(forwards) == ran


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_measured_anew_and_said(damage, tokens, cache, forwards, caplog):
    first = find(make_llama(), tokens, cache, Moments)
    (entry,) = entries(cache)
    content = bytearray(entry.path.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
    else:
        del content[len(content) // 2 if damage == "cut" else 0 :]
    entry.path.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="flapkit"):
        again = find(make_llama(), tokens, cache, Moments)
    assert "damaged" in caplog.text
    assert "measuring Moments again" in caplog.text
    assert len(forwards) == 6
    for site in first:
        assert torch.equal(first[site][Moments].variance, again[site][Moments].variance)
    find(make_llama(), tokens, cache, Moments)
    assert len(forwards) == 6


STATISTIC = """
import torch
from flapkit.interfaces import Statistic

class Largest(Statistic):
    def __init__(self, channels):
        super().__init__(channels)
        self.add_state("largest", torch.zeros(channels))

    def update(self, x):
        self.largest = torch.maximum(self.largest, x.abs().max(dim=0).values) * 1

"""


def load(path):
    spec = importlib.util.spec_from_file_location("a_statistic_of_ones_own", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Largest


def test_what_a_statistic_measures_has_a_version(tokens, tmp_path):
    """Its source does not count: a comment empties no cache. Its version does, and so do those of its parents."""
    path = tmp_path / "mine.py"
    key = calibrated(make_llama(), tokens)

    def file(source):
        path.write_text(source)
        return key.file(tmp_path, load(path))

    before = file(STATISTIC)
    assert file(STATISTIC + "# A comment.\n") == before
    assert file(STATISTIC.replace("(Statistic):", "(Statistic):\n    version = 2\n")) != before


def test_a_parents_version_counts(tokens, tmp_path, monkeypatch):
    key = calibrated(make_llama(), tokens)
    before = key.file(tmp_path, HeldOutGram)
    monkeypatch.setattr(Gram, "version", Gram.version + 1)
    monkeypatch.setattr(HeldOutGram, "version", Gram.version - 1, raising=False)
    assert key.file(tmp_path, HeldOutGram) != before


def test_another_format_of_records_is_another_key(tokens, monkeypatch):
    model = make_llama()
    before = calibrated(model, tokens).digest
    monkeypatch.setattr("flapkit.execution.cache.FORMAT", FORMAT + 1)
    assert calibrated(model, tokens).digest != before


def test_a_file_of_another_format_is_as_none(tokens, cache, forwards, caplog, monkeypatch):
    find(make_llama(), tokens, cache, Moments)
    ran = len(forwards)
    with monkeypatch.context() as patched:
        patched.setattr("flapkit.execution.record_files.FORMAT", FORMAT + 1)
        find(make_llama(), tokens, cache, Moments)
    assert len(forwards) == 2 * ran
    assert "damaged" not in caplog.text


def test_a_class_without_a_lasting_name_is_not_kept(tokens, cache, monkeypatch):
    """In a notebook the next class of that name may measure something else."""
    monkeypatch.setattr(Moments, "__module__", "__main__")
    find(make_llama(), tokens, cache, Moments)
    assert entries(cache) == []


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(tokens, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file is in the way")
    with caplog.at_level(logging.WARNING, logger="flapkit"):
        find(make_llama(), tokens, tmp_path / "cache", Moments)
    assert "cannot be cached" in caplog.text


def test_nothing_half_written_is_left(tokens, cache):
    model = make_llama()
    sites = flapkit.sites(model)
    all_of_it = measure(model, sites, [Moments], [{"input_ids": tokens}])
    measured = {name: statistics[Moments] for name, statistics in all_of_it.items()}

    key = calibrated(model, tokens)
    with largest_file(1000):
        write_statistic(cache, key, Moments, measured)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert entries(cache) == []
    assert read_statistic(cache, key, Moments, lambda site: CPU) is None


def test_cleared(tokens, cache):
    find(make_llama(), tokens, cache, Moments, Gram)
    (cache / "statistics" / ".half.partial").write_bytes(b"left by a kill")
    (cache / "mine.txt").write_text("not flapkit's")
    assert {entry.statistic for entry in entries(cache)} == {"Moments", "Gram", ""}
    assert len(clear(cache)) == 3
    assert entries(cache) == []
    assert (cache / "mine.txt").exists()


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FLAPKIT_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("FLAPKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "flapkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "flapkit"


def test_what_a_dead_process_left_is_removed_and_what_a_live_one_writes_is_not(tokens, cache):
    folder = cache / "statistics"
    folder.mkdir()
    (folder / ".dead.1.partial").write_bytes(b"half")
    with (folder / ".live.2.partial").open("wb") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        find(make_llama(), tokens, cache, Moments)
        assert [path.name for path in folder.glob(".*")] == [".live.2.partial"]


def test_a_file_that_is_written_is_locked(tmp_path, monkeypatch):
    def save(tensors, path, metadata):
        remove_abandoned(tmp_path)
        assert path.exists()
        path.write_bytes(b"whole")

    monkeypatch.setattr(weights, "save_file", save)
    write_tensors(tmp_path / "file", {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
