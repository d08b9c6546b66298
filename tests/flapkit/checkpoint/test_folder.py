from __future__ import annotations

import errno
import os

import pytest

from flapkit.checkpoint import check_output, new_folder
from flapkit.checkpoint.folder import MARK
from flapkit.errors import OutputError


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
