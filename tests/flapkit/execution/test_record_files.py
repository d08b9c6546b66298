"""What a record guarantees: what was written is read, or nothing is."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from flapkit.execution.record_files import (
    FORMAT,
    Record,
    RecordError,
    hash_tensors,
    read_record,
    read_record_metadata,
    write_record,
)
from flapkit.execution.resume import ResumeStore, read_finished
from flapkit.system.errors import OutputError
from flapkit.system.workdir import open_workdir

RECORD = Record({"a/b": torch.arange(6.0).reshape(2, 3), "c": torch.ones(0, dtype=torch.float64)}, {"notes": {"x": 1}})


@pytest.fixture
def path(tmp_path):
    write_record(tmp_path / "new" / "it.safetensors", RECORD)
    return tmp_path / "new" / "it.safetensors"


def test_a_record_is_read_as_it_was_written(path):
    record = read_record(path)
    assert record.metadata == read_record_metadata(path) == RECORD.metadata
    assert hash_tensors(record.tensors.items()) == hash_tensors(RECORD.tensors.items())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_record_of_nothing(tmp_path):
    write_record(tmp_path / "it", Record({}))
    assert read_record(tmp_path / "it") == Record({}, {})


@pytest.mark.parametrize("place", [-1, -20, 100])
def test_a_flipped_bit_is_found(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(RecordError):
        read_record(path)


def test_other_files_are_no_records(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "weights", {"format": "pt"})
    for name in ("weights", "nothing"):
        with pytest.raises(RecordError):
            read_record(tmp_path / name)


def test_another_format_is_refused_by_a_run_that_is_resumed(tmp_path, monkeypatch):
    with open_workdir(tmp_path / "out", resume=True) as work:
        with monkeypatch.context() as patched:
            patched.setattr("flapkit.execution.record_files.FORMAT", FORMAT + 1)
            ResumeStore(work).find("scores", lambda: RECORD)
        with pytest.raises(OutputError, match=r"scores\.safetensors: written by another version of flapkit") as caught:
            read_finished(work.path("scores.safetensors"))
        assert "--overwrite" in str(caught.value)
        work.finish()
