"""The work folder of an output: who holds it, what it keeps, and what becomes of it."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from flapkit.checkpoint.folder import MARK, new_folder
from flapkit.system.errors import OutputError
from flapkit.system.workdir import WorkDir, differences, exchange, open_workdir, work_folder

HOLDS = """
import fcntl, os, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(f"process {os.getpid()} on its machine")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""
"""Holds a lock, as ``open_workdir`` does, without importing what takes seconds."""


WATCHES = """
import os, sys
print("watching", flush=True)
while True:
    try:
        os.stat(sys.argv[1])
    except FileNotFoundError:
        print("missing", flush=True)
"""


def hold(output):
    with open_workdir(output):
        pass


def stopped(output, asked=None, pieces=("statistics",)):
    """Leave what a stopped run leaves."""

    def work():
        with open_workdir(output, asked) as held:
            for piece in pieces:
                held.path(piece).write_text("half an hour's work")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()


def old_output(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARK).write_text("old")
    return tmp_path / "out"


@pytest.mark.parametrize("spelt", ["out", "./here/../out", "link/out", "here/../link/out"])
def test_one_output_has_one_holder_however_it_is_spelt(tmp_path, monkeypatch, spelt):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    with open_workdir(tmp_path / "out"):
        with (
            pytest.raises(OutputError, match=f"process {os.getpid()} on .* is writing it"),
            open_workdir(tmp_path / spelt),
        ):
            pass
        with pytest.raises(OutputError, match="is writing it"), new_folder(tmp_path / spelt, overwrite=True):
            pass
    with open_workdir(tmp_path / spelt):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link"]


def test_a_process_that_died_holds_nothing(tmp_path):
    lock = work_folder(tmp_path / "out") / "lock"
    lock.parent.mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDS, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(OutputError, match=f"process {process.pid} on its machine is writing it"):
        hold(tmp_path / "out")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert lock.exists()
    hold(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_run_that_finished_nothing(tmp_path):
    stopped(tmp_path / "runs" / "deep" / "out", pieces=())
    assert list(tmp_path.iterdir()) == []


def test_what_was_finished_is_neither_lost_nor_taken_unasked(tmp_path, caplog):
    stopped(tmp_path / "out", {"budget": {"ratio": 0.2}})
    assert "finished work is in" in caplog.text
    with pytest.raises(OutputError, match=r"\(statistics\); continue from it with --resume, or remove"):
        stopped(tmp_path / "out")
    with open_workdir(tmp_path / "out", {"budget": {"ratio": 0.2}}, resume=True) as work:
        assert work.records() == ["statistics"]
        work.finish()
    assert list(tmp_path.iterdir()) == []


def test_begun_anew(tmp_path, caplog):
    stopped(tmp_path / "out")
    with open_workdir(tmp_path / "out", overwrite=True) as work:
        assert work.records() == []
    assert "removed the finished work of an interrupted run: statistics" in caplog.text


def test_nothing_is_removed_where_the_output_may_not_be_written(tmp_path):
    stopped(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="was not written by flapkit"), new_folder(tmp_path / "out", overwrite=True):
        pass
    assert WorkDir(tmp_path / "out").records() == ["statistics"]


def test_another_run_does_not_go_on_with_it(tmp_path):
    stopped(tmp_path / "out", {"budget": {"ratio": 0.2, "of": "blocks"}, "metric": "wifv"})
    asked = {"budget": {"ratio": 0.3, "of": "blocks"}, "metric": "wifv", "searcher": "al_am"}
    message = r"used a different recipe: budget.ratio: 0.2 then, 0.3 now; searcher: null then, \"al_am\" now"
    with pytest.raises(OutputError, match=message), open_workdir(tmp_path / "out", asked, resume=True):
        pass
    with open_workdir(tmp_path / "out", {"metric": "wifv", "budget": {"of": "blocks", "ratio": 0.2}}, resume=True):
        pass


def test_text_or_weights_that_changed_meanwhile(tmp_path):
    def work(text, resume):
        with open_workdir(tmp_path / "out", {"metric": "wifv"}, resume=resume) as held:
            held.claim({"text": text})
            held.path("piece").touch()
            raise KeyboardInterrupt

    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            work("one", resume)
    with pytest.raises(OutputError, match='used a different recipe: text: "one" then, "other" now'):
        work("other", True)


def test_differences_of_lists():
    assert differences({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ['a: [1, {"b": 2}] then, [1, {"b": 3}] now']


def test_an_output_is_never_missing_while_it_is_replaced(tmp_path):
    """Another process looks for it all the time, and sees an old or a new one each time."""
    out, other = old_output(tmp_path), tmp_path / "other"
    other.mkdir()
    if not exchange(other, out):
        pytest.skip("this system or file system cannot exchange two folders")
    exchange(other, out)
    watcher = subprocess.Popen([sys.executable, "-c", WATCHES, str(out)], stdout=subprocess.PIPE, text=True)
    assert watcher.stdout.readline() == "watching\n"
    for number in range(100):
        with new_folder(out, overwrite=True) as folder:
            (folder / MARK).write_text(str(number))
    watcher.send_signal(signal.SIGTERM)
    assert watcher.communicate()[0] == ""
    assert list(tmp_path.iterdir()) == [out, other]


def test_an_output_that_was_set_aside_is_put_back(tmp_path, caplog):
    """As a kill between the two renames of a swap leaves it."""
    out = old_output(tmp_path)
    work = WorkDir(out)
    (work.folder / "replaced").mkdir(parents=True)
    (work.folder / "partial" / "out").mkdir(parents=True)
    out.rename(work.folder / "replaced" / "out")
    with open_workdir(out):
        assert (out / MARK).read_text() == "old"
    assert "restored; an interrupted run had moved it aside" in caplog.text
    assert list(tmp_path.iterdir()) == [out]


def test_what_was_replaced_is_removed_where_the_new_output_is_whole(tmp_path):
    out = old_output(tmp_path)
    aside = WorkDir(out).folder / "replaced" / "out"
    aside.mkdir(parents=True)
    (aside / MARK).write_text("older")
    with open_workdir(out):
        pass
    assert (out / MARK).read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open_workdir(tmp_path / "out") as work:
        assert work.folder.is_dir()
    assert "the file system has no locks" in caplog.text


def test_other_ranks_only_use_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with open_workdir(tmp_path / "out", resume=True) as work:
        assert work.resumed
    assert list(tmp_path.iterdir()) == []
