from __future__ import annotations

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import largest_file, make_llama

import flapkit
from flapkit.checkpoint.folder import MARK, check_output, new_folder
from flapkit.system.errors import ModelError, OutputError
from flapkit.system.workdir import work_folder


def test_appears_whole(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_nothing_is_left_of_a_failure(tmp_path):
    def write():
        with new_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_exists(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARK).write_text("{}")
    with pytest.raises(OutputError, match="exists already"):
        check_output(tmp_path / "out")
    with new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("what", ["an output", "an interrupted run's work"])
def test_python_is_told_of_its_own_argument(llama, tokens, tmp_path, what):
    flapkit.prune_(llama, tokens, ratio=0.2)
    if what == "an output":
        flapkit.save(llama, tmp_path / "out")
    else:
        work = work_folder(tmp_path / "out")
        work.mkdir()
        (work / "record").write_text("{}")
    with pytest.raises(OutputError, match=r"overwrite=True$") as refused:
        flapkit.save(llama, tmp_path / "out")
    assert "--overwrite" not in str(refused.value)
    flapkit.save(llama, tmp_path / "out", overwrite=True)


def test_weights_that_are_not_finite_are_not_saved(llama, tokens, tmp_path):
    flapkit.prune_(llama, tokens[:2], ratio=0.2)
    with torch.no_grad():
        llama.model.norm.weight[:3] = torch.nan
    with pytest.raises(ModelError, match=r"save: model\.norm\.weight: 3 of .* nothing was written.* lower learning"):
        flapkit.save(llama, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_overwrites_only_its_own(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="was not written by flapkit"):
        check_output(tmp_path, overwrite=True)


def test_a_file_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OutputError):
            check_output(path)


def test_disk_full(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARK).write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    def write():
        with new_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "new").write_text("new")

    with pytest.raises(OutputError, match="disk is full"):
        write()
    assert (tmp_path / "out" / MARK).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def old_and_new(tmp_path, pruned_folder, tokens):
    """An output that is there, and a pruned model that is to replace it."""
    model = make_llama(num_key_value_heads=2, vocab_size=9600)
    plan = flapkit.prune_(model, tokens, ratio=0.4)
    before = {path.name: path.read_bytes() for path in pruned_folder.iterdir()}
    return pruned_folder, before, lambda: flapkit.save(model, pruned_folder, plan, overwrite=True)


def is_whole(folder, before):
    return {path.name: path.read_bytes() for path in folder.iterdir()} == before and not list(folder.parent.glob(".*"))


def test_the_room_is_looked_for_before_anything_is_written(old_and_new, monkeypatch):
    folder, before, save = old_and_new
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with pytest.raises(OutputError, match=r"the disk has 2\.0 MB free, 2\.5 MB needed; nothing was written"):
        save()
    assert is_whole(folder, before)


def test_no_room_in_the_middle_of_the_weights(old_and_new):
    """A real refusal of the system, to the library that writes the weights."""
    folder, before, save = old_and_new
    with (
        largest_file(1_000_000),
        pytest.raises(OutputError, match=r"the disk is full \(.*\): .* MB free, 2\.5 MB needed"),
    ):
        save()
    assert is_whole(folder, before)
    save()
    assert not is_whole(folder, before)
