"""Any file is text, or a DataError that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import SCALARS, VALUES, cases
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flapkit.bundled import bundled_models
from flapkit.errors import DataError
from flapkit.text import load_documents
from flapkit.windows import encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(bundled_models()["tiny-llama"])


def documents(path: Path, content: bytes, field: str | None = None) -> list[str]:
    """Read the documents of a file, or nothing where it is refused in words."""
    path.write_bytes(content)
    try:
        found = load_documents(str(path), field=field)
    except DataError as error:
        if path.name not in str(error):
            raise AssertionError(error) from error
        return []
    assert any(text.strip() for text in found)
    return found


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis")


@cases(600)
@given(st.text(max_size=30), st.sampled_from(ENCODINGS))
@example("", "utf-8")
@example(" \n\t\r\n", "utf-8-sig")
@example("\0\0\0", "utf-8")
@example("text", "utf-16")
@example("grüße", "latin-1")
def test_text_in_any_encoding(folder, text, encoding):
    found = documents(folder / "a.txt", text.encode(encoding, "ignore"))
    if found and encoding in ("utf-8", "utf-8-sig") and "\r" not in text and "\ufeff" not in text:
        assert found == [text.encode("utf-8", "ignore").decode()]


@cases(600)
@given(st.binary(max_size=60), st.sampled_from(["a.txt", "a.jsonl", "a.parquet"]))
def test_any_bytes(folder, content, name):
    documents(folder / name, content)


LINES = st.dictionaries(st.sampled_from(["text", "messages", "conversations", "x", ""]), VALUES, max_size=3).map(
    json.dumps
)
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), SCALARS, max_size=3) | SCALARS,
    max_size=3,
)
CONVERSATIONS = st.fixed_dictionaries({"messages": MESSAGES}).map(json.dumps)


@cases(1000)
@given(st.lists(LINES | CONVERSATIONS | VALUES.map(json.dumps) | st.text(max_size=20), max_size=4))
@example(['{"text": "a"}', '{"text": 1}'])
@example(['{"text": "a"}', '{"body": "b"}'])
@example(['{"text": null}'])
@example(['{"text": "\\ud800"}'])
@example(['{"text": "a", "text": "b"}'])
@example(["[" * 100_000])
@example(['{"text": ' + "9" * 5000 + "}"])
@example(['{"messages": [{"role": "user"}]}'])
@example(['{"messages": [[]]}'])
def test_json_lines(folder, tokenizer, lines):
    found = documents(folder / "a.jsonl", "\n".join(lines).encode("utf-8", "surrogatepass"))
    if found:
        encode(tokenizer, found, " ")


def whole_table() -> bytes:
    written = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text", "more"] * 50, "n": list(range(100))}), written)
    return written.getvalue().to_pybytes()


TABLE = whole_table()


@cases(600)
@given(st.integers(0, len(TABLE) - 1), st.binary(min_size=0, max_size=8), st.booleans())
def test_a_damaged_table(folder, place, patch, cut):
    damaged = TABLE[:place] + patch + (b"" if cut else TABLE[place + len(patch) :])
    documents(folder / "a.parquet", damaged)


COLUMNS = {
    "null": pyarrow.array([None, None]),
    "numbers": pyarrow.array([1, 2]),
    "bytes": pyarrow.array([b"\xff", b"a"]),
    "lists": pyarrow.array([["a"], ["b"]]),
    "structs": pyarrow.array([{"role": "user", "content": "x"}, None]),
    "messages": pyarrow.array([[{"role": "user", "content": "x"}], [{"role": None, "content": None}]]),
    "dictionary": pyarrow.array(["a", "b"]).dictionary_encode(),
    "times": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
    "empty": pyarrow.array([], pyarrow.string()),
}


@pytest.mark.parametrize("of", COLUMNS)
def test_columns_of_any_type(folder, of):
    written = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": COLUMNS[of]}), written)
    found = documents(folder / "a.parquet", written.getvalue().to_pybytes())
    assert bool(found) == (of == "dictionary")


def test_a_table_without_columns_and_one_without_the_field(folder):
    written = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), written)
    assert not documents(folder / "a.parquet", written.getvalue().to_pybytes())
    assert documents(folder / "a.parquet", written.getvalue().to_pybytes(), field="body") == ["a"]


def test_what_is_no_text_file(folder):
    for name in ("a.csv", "a", "a.json", "a.pickle"):
        (folder / name).write_text("text\nsome")
        with pytest.raises(DataError, match=r"not a \.txt"):
            load_documents(str(folder / name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_line_of_100_mb(folder, name):
    line = "x" * 10**8
    content = line if name == "a.txt" else json.dumps({"text": line})
    assert documents(folder / name, content.encode()) == [line]
    (folder / name).unlink()
