from __future__ import annotations

import json
from pathlib import Path

import pytest

from flapkit.evaluation.local_tasks import TASKS, LocalTask, find_task
from flapkit.system.errors import DataError

ROW = {"query": "Question: why?", "choices": ["so", "because"], "gold": 1}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("boolq", "boolq.jsonl"),
        ("openbookqa", "openbook_qa.jsonl"),
        ("hellaswag", "hellaswag_2000.jsonl"),
        ("arc_easy", "ARC-Easy.jsonl"),
    ],
)
def test_a_file_is_found_by_its_name(name: str, file: str, tmp_path: Path) -> None:
    write(tmp_path / file, ROW)
    write(tmp_path / "winogrande.jsonl", ROW)
    assert find_task(name, tmp_path).path.name == file


def test_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path / "piqua.jsonl", ROW)
    with pytest.raises(DataError, match=r"no file for task 'piqa'; did you mean 'piqua.jsonl'"):
        find_task("piqa", tmp_path)
    with pytest.raises(DataError, match="folder not found"):
        find_task("piqa", tmp_path / "none")


def test_two_files(tmp_path: Path) -> None:
    write(tmp_path / "piqa.jsonl", ROW)
    write(tmp_path / "piqa_2.jsonl", ROW)
    with pytest.raises(DataError, match=r"piqa.jsonl, piqa_2.jsonl all start with 'piqa'"):
        find_task("piqa", tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "expected {query"),
        ({**ROW, "query": None}, "expected {query"),
        ({**ROW, "choices": "ab"}, "expected {query"),
        ({**ROW, "choices": ["only one"]}, "expected {query"),
        ({**ROW, "choices": ["a", ""]}, "expected {query"),
        ({**ROW, "gold": 2}, "gold is 2"),
        ({**ROW, "gold": True}, "gold is True"),
        ({**ROW, "gold": "1"}, "gold is '1'"),
    ],
)
def test_a_bad_row_is_named(row: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "piqa.jsonl", ROW, row)
    with pytest.raises(DataError, match=r"piqa\.jsonl:2: ") as error:
        LocalTask("piqa", path).rows()
    assert message in str(error.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON"):
        LocalTask("piqa", tmp_path / "a.jsonl").rows()
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        LocalTask("piqa", tmp_path / "a.jsonl").rows()
    (tmp_path / "a.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(DataError, match="the file has no rows"):
        LocalTask("piqa", tmp_path / "a.jsonl").rows()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_how_rows_become_prompts(name: str, tmp_path: Path) -> None:
    row = {"continuation": "ran.", "context_options": ["He", "She"], "gold": 0} if name == "winogrande" else ROW
    config = LocalTask(name, write(tmp_path / "rows.jsonl", row)).config()
    assert config["task"] == name
    assert config["output_type"] == "multiple_choice"
    assert config["custom_dataset"]()["test"][0]["gold"] == row["gold"]


def test_a_line_separator_is_no_line_break(tmp_path: Path) -> None:
    path = tmp_path / "piqa.jsonl"
    path.write_text(json.dumps({**ROW, "query": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert LocalTask("piqa", path).rows()[0]["query"] == "a\u2028b"
