"""Any file is text, or a DataError that names it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from flapkit_adapters.vicuna import Vicuna
from fuzzing import DAMAGE, SCALARS, VALUES, cases, damaged, read, tampered, to_bytes
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flapkit.checkpoint.bundled import bundled_models
from flapkit.evaluation.local_tasks import LocalTask
from flapkit.run.text import renderer
from flapkit.system.errors import DataError
from flapkit.text.files import COMPRESSIONS, FORMATS
from flapkit.text.source import TextSource
from flapkit.text.windows import encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(bundled_models()["tiny-llama"])


def documents(path: Path, content: bytes, field: str | None = None, render: Any = None) -> list[str]:
    """Read the documents of a file, or nothing where it is refused in words."""
    path.write_bytes(content)
    try:
        found = TextSource(dataset=str(path), field=field).documents("calibration", render)
    except DataError as error:
        if path.name not in str(error):
            raise AssertionError(error) from error
        return []
    assert any(text.strip() for text in found)
    return found


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "shift_jis")


@cases(240)
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


FILES = [f"a{suffix}{compression}" for suffix in FORMATS for compression in ("", *COMPRESSIONS)]


@cases(240)
@given(st.binary(max_size=60), st.sampled_from(FILES))
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


@cases(400)
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
    found = documents(folder / "a.jsonl", to_bytes("\n".join(lines)))
    if found:
        encode(tokenizer, found, " ")


SPEAKERS = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "", None, 5])
TURNS = st.lists(
    st.fixed_dictionaries({"role": SPEAKERS, "content": st.text(max_size=9) | SCALARS})
    | st.fixed_dictionaries({"from": SPEAKERS, "value": st.text(max_size=9) | SCALARS}),
    max_size=4,
)
TEMPLATES = ["{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", "{{ messages[9].x }}", "{{ 1/0 }}"]


@cases(400)
@given(st.lists(TURNS | MESSAGES, min_size=1, max_size=3), st.sampled_from([*TEMPLATES, "vicuna"]))
@example([[]], "vicuna")
@example([[{"role": "assistant", "content": "a"}]], "vicuna")
@example([[{"role": "user", "content": "a"}]], "{{ 1/0 }}")
@example([[{"role": "user", "content": "<s>"}, {"role": "user", "content": ""}]], "vicuna")
def test_conversations(folder, tokenizer, conversations, template):
    adapter = Vicuna() if template == "vicuna" else None
    tokenizer.chat_template = None if adapter else template
    lines = "\n".join(json.dumps({"messages": each}) for each in conversations)
    found = documents(folder / "a.jsonl", lines.encode(), render=renderer(adapter, tokenizer))
    if found:
        encode(tokenizer, found, " ")


def whole_table() -> bytes:
    written = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text", "more"] * 50, "n": list(range(100))}), written)
    return written.getvalue().to_pybytes()


TABLE = whole_table()


@cases(240)
@given(DAMAGE)
def test_a_damaged_table(folder, damage):
    documents(folder / "a.parquet", damaged(TABLE, damage))


def whole_arrow() -> bytes:
    written = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": ["some text", "more"] * 50, "n": list(range(100))})
    with pyarrow.ipc.new_stream(written, table.schema) as stream:
        stream.write_table(table)
    return written.getvalue().to_pybytes()


FILE_CONTENTS = {
    "a.arrow": whole_arrow(),
    "a.csv": b'n,text\n1,"some, text"\n2,more\n' * 9,
    "a.json": json.dumps([{"text": "some text", "n": 1}, {"text": "more"}] * 9).encode(),
    "a.jsonl.gz": gzip.compress(b'{"text": "some text"}\n' * 50),
}


@pytest.mark.parametrize("name", FILE_CONTENTS)
def test_a_damaged_file(folder, name):
    @cases(80)
    @given(DAMAGE)
    def check(damage):
        documents(folder / name, damaged(FILE_CONTENTS[name], damage))

    check()


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


def arrow(depth: int = 2) -> st.SearchStrategy[Any]:
    """Choose the type of a column."""
    plain = st.sampled_from(
        [
            pyarrow.null(),
            pyarrow.int8(),
            pyarrow.uint64(),
            pyarrow.float16(),
            pyarrow.bool_(),
            pyarrow.string(),
            pyarrow.large_string(),
            pyarrow.binary(),
            pyarrow.binary(2),
            pyarrow.date32(),
            pyarrow.timestamp("us", "UTC"),
            pyarrow.duration("s"),
            pyarrow.decimal128(5, 2),
        ]
    )
    if not depth:
        return plain
    inner = arrow(depth - 1)
    names = st.sampled_from(["role", "content", "from", "value"])
    structs = st.dictionaries(names, inner, min_size=1, max_size=3).map(lambda of: pyarrow.struct([*of.items()]))
    return (
        plain | inner.map(pyarrow.list_) | structs | st.tuples(pyarrow_keys(), inner).map(lambda of: pyarrow.map_(*of))
    )


def pyarrow_keys() -> st.SearchStrategy[Any]:
    return st.sampled_from([pyarrow.string(), pyarrow.int64()])


def values_of(of: Any) -> st.SearchStrategy[Any]:
    """Choose what a column of a type holds."""
    if pyarrow.types.is_list(of):
        return st.none() | st.lists(values_of(of.value_type), max_size=2)
    if pyarrow.types.is_struct(of):
        return st.none() | st.fixed_dictionaries({each.name: values_of(each.type) for each in of})
    if pyarrow.types.is_map(of):
        return st.none() | st.lists(st.tuples(values_of(of.key_type).filter(bool), values_of(of.item_type)), max_size=2)
    if pyarrow.types.is_string(of) or pyarrow.types.is_large_string(of):
        return st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    if pyarrow.types.is_integer(of):
        return st.none() | st.integers(0, 99)
    return st.none() | (st.booleans() if pyarrow.types.is_boolean(of) else st.nothing())


@st.composite
def columns(draw: st.DrawFn) -> Any:
    of = draw(arrow())
    return pyarrow.array(draw(st.lists(values_of(of), max_size=3)), of)


@cases(120)
@given(st.dictionaries(st.sampled_from(["text", "messages", "conversations", "x", ""]), columns(), max_size=2))
def test_a_table_of_any_types(folder, tokenizer, table):
    length = max(map(len, table.values()), default=0)
    whole = {
        name: pyarrow.concat_arrays([each, pyarrow.nulls(length - len(each), each.type)])
        for name, each in table.items()
    }
    written = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(whole), written)
    tokenizer.chat_template = TEMPLATES[0]
    documents(folder / "a.parquet", written.getvalue().to_pybytes(), render=renderer(None, tokenizer))


ROW = {"query": "a", "choices": ["b", "c"], "gold": 1}
WINOGRANDE = {"continuation": "a", "context_options": ["b", "c"], "gold": 0}


@pytest.mark.parametrize(("task", "row"), [("boolq", ROW), ("winogrande", WINOGRANDE)])
def test_rows_of_a_local_task(folder, task, row):
    path = folder / f"{task}.jsonl"

    @cases(200)
    @given(st.lists(tampered(row).map(json.dumps) | st.text(max_size=9) | st.binary(max_size=9), max_size=3))
    @example(["[" * 100_000])
    @example([json.dumps({**row, "gold": True})])
    @example([json.dumps({**row, "gold": 10**30})])
    def check(lines):
        path.write_bytes(b"\n".join(map(to_bytes, lines)))
        for each in read(lambda: LocalTask(task, path).rows(), str(path)) or ():
            options = each.get("choices") or each["context_options"]
            assert options[each["gold"]]

    check()


def test_a_table_without_columns_and_one_without_the_field(folder):
    written = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), written)
    assert not documents(folder / "a.parquet", written.getvalue().to_pybytes())
    assert documents(folder / "a.parquet", written.getvalue().to_pybytes(), field="body") == ["a"]


def test_what_is_no_text_file(folder):
    for name in ("a.html", "a", "a.zip", "a.pickle", "a.gz"):
        (folder / name).write_text("text\nsome")
        with pytest.raises(DataError, match="this format is not read"):
            TextSource(dataset=str(folder / name)).documents("calibration")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_line_of_100_mb(folder, name):
    line = "x" * 10**8
    content = line if name == "a.txt" else json.dumps({"text": line})
    assert documents(folder / name, content.encode()) == [line]
    (folder / name).unlink()
