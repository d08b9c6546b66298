from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from flapkit.system.errors import DataError
from flapkit.text.named import DATASETS, NamedDataset, Purpose
from flapkit.text.source import TextSource
from flapkit.text.stdlib import is_held_out, stdlib_documents, stdlib_modules

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def jsonl(path: Path, *rows: Any) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def render(conversation: Any) -> str:
    return "|".join(f"{message['role']}:{message['content']}" for message in conversation)


def load_documents(
    dataset: str, *, render: Any = None, purpose: Purpose = "calibration", **where: str | None
) -> list[str]:
    return TextSource(dataset=dataset, **where).documents(purpose, render)


def fails(dataset: str, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        load_documents(dataset, **options)
    assert error.value.exit_code == 2
    return str(error.value)


class Hub:
    """The hub as a local folder for each id: what `datasets` reads there is what it would have downloaded."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.calls: list[tuple[Any, ...]] = []
        load, names = datasets.load_dataset, datasets.get_dataset_split_names

        def load_dataset(hub: str, subset: str | None = None, **options: Any) -> Any:
            self.calls.append((hub, subset, options["split"], options["revision"], options.get("data_files")))
            options.pop("revision")
            return load(str(root / hub), split=options["split"], cache_dir=str(root / "cache"))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda hub, subset: names(str(root / hub), subset))

    def add(self, hub: str, **splits: list[dict[str, Any]]) -> None:
        for split, rows in splits.items():
            jsonl(self.root / hub / f"{split}.jsonl", *rows)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    datasets.disable_progress_bars()
    return Hub(tmp_path / "hub", monkeypatch)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    assert load_documents(write(tmp_path / "a.txt", "one\n\ntwo\n")) == ["one\n\ntwo\n"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert load_documents(write(tmp_path / "a.txt", b"\xef\xbb\xbfone")) == ["one"]


def test_a_jsonl_line_is_a_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n\n{"text": "", "n": 1}\n{"text": "é"}')
    assert load_documents(path) == ["one", "", "é"]


def test_a_parquet_row_is_a_document(tmp_path: Path) -> None:
    assert load_documents(parquet(tmp_path / "a.parquet", {"id": [1, 2], "text": ["one", "two"]})) == ["one", "two"]


def test_a_folder_is_its_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "2")
    jsonl(tmp_path / "c" / "x.jsonl", {"text": "3"})
    write(tmp_path / "a.txt", "1")
    write(tmp_path / ".hidden", b"\xff")
    assert load_documents(str(tmp_path)) == ["1", "2", "3"]


def test_the_first_known_field_is_taken_unless_one_is_named(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"summary": "short", "messages": CHAT, "text": "long"})
    assert load_documents(path) == ["long"]
    assert load_documents(path, field="summary") == ["short"]
    assert load_documents(path, field="messages", render=render) == ["user:hi|assistant:hello"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("messages", CHAT), ("conversations", [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}])],
)
def test_conversations_are_rendered(tmp_path: Path, field: str, value: Any) -> None:
    expected = ["user:hi|assistant:hello"]
    assert load_documents(jsonl(tmp_path / "a.jsonl", {field: value}), render=render) == expected
    assert load_documents(parquet(tmp_path / "a.parquet", {field: [value]}), render=render) == expected


def test_an_empty_conversation_is_an_empty_document(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": []}, {"messages": CHAT})
    assert load_documents(path, render=render) == ["", "user:hi|assistant:hello"]


def test_a_conversation_that_nothing_renders(tmp_path: Path) -> None:
    message = fails(jsonl(tmp_path / "a.jsonl", {"messages": CHAT}))
    assert "a.jsonl:1: this is a conversation" in message
    assert "adapter: vicuna" in message


def test_a_conversation_that_the_renderer_refuses_is_named(tmp_path: Path) -> None:
    def refuse(conversation: Any) -> str:
        raise DataError("no such format")

    path = jsonl(tmp_path / "a.jsonl", {"messages": []}, {"messages": CHAT})
    assert fails(path, render=refuse).endswith("a.jsonl:2: no such format")


def test_a_missing_field_lists_the_fields(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "x", "body": "y"}, {"body": "y"})
    assert "a.jsonl:1: no field 'txt'; did you mean 'text'? (known: body, text)" in fails(path, field="txt")
    assert "a.jsonl:2: none of the fields (body)" in fails(path)
    table = parquet(tmp_path / "a.parquet", {"body": ["x"], "id": [1]})
    assert "none of the fields (body, id) is one of text, conversations, messages; set `field`" in fails(table)
    assert "no field 'nody'; did you mean 'body'?" in fails(table, field="nody")
    assert "no field 'body' (known: text)" in fails(write(tmp_path / "a.txt", "x"), field="body")


@pytest.mark.parametrize(
    ("value", "found"), [(3, "a int"), (None, "nothing (null)"), (["a"], "a list"), ({}, "a dict")]
)
def test_a_field_that_is_no_text(tmp_path: Path, value: Any, found: str) -> None:
    message = fails(jsonl(tmp_path / "a.jsonl", {"text": "x"}, {"text": value}))
    assert f"a.jsonl:2: expected text, or a conversation as a list of messages; found {found}" in message


def test_empty_text(tmp_path: Path) -> None:
    assert "no text: 2 documents, all empty" in fails(jsonl(tmp_path / "a.jsonl", {"text": ""}, {"text": " \n"}))
    assert "no text: it has no rows" in fails(write(tmp_path / "b.jsonl", ""))


def test_broken_files(tmp_path: Path) -> None:
    assert "a.jsonl:2: not JSON" in fails(write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": \n'))
    assert "b.jsonl:1: expected an object with a text field, found list" in fails(write(tmp_path / "b.jsonl", "[1]"))
    for name in ("c.txt", "c.jsonl"):
        assert f"{name}: not UTF-8" in fails(write(tmp_path / name, b'{"text": "caf\xe9"}'))
    assert "d.parquet: cannot be read" in fails(write(tmp_path / "d.parquet", "PAR1 it is not"))


def test_other_files(tmp_path: Path) -> None:
    assert "a.pdf: this format is not read; the formats are .txt, .md, .jsonl" in fails(write(tmp_path / "a.pdf", "x"))
    message = fails(str(tmp_path))
    assert "a.pdf: this format is not read; move it out of" in message
    assert ".arrow, .parquet, also compressed as .gz, .bz2, .xz, .zst" in message
    assert "a.gz: this format is not read" in fails(write(tmp_path / "a.gz", gzip.compress(b"x")))
    (tmp_path / "empty").mkdir()
    assert "the folder has no files with text (.txt, " in fails(str(tmp_path / "empty"))


TEXTS = ['one, "two"', "NA", "zwei\nZeilen é"]
ROWS = [{"text": text, "id": number} for number, text in enumerate(TEXTS)]


def csv_of(separator: str) -> bytes:
    table = io.StringIO()
    writer = csv.DictWriter(table, ["text", "id"], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return table.getvalue().encode()


def arrow() -> bytes:
    written = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(written, table.schema) as stream:
        stream.write_table(table)
    return written.getvalue().to_pybytes()


def parquet_of() -> bytes:
    written = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), written)
    return written.getvalue().to_pybytes()


LINES_OF = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CONTENTS = {
    "a.jsonl": LINES_OF,
    "a.ndjson": LINES_OF,
    "a.json": json.dumps(ROWS, indent=1).encode(),
    # Lines in a .json, as C4 has them.
    "c4-train.00000-of-01024.json": LINES_OF,
    "a [1]*.json": LINES_OF,
    "a.csv": csv_of(","),
    "a.tsv": csv_of("\t"),
    "a.arrow": arrow(),
    "a.parquet": parquet_of(),
}


def zstandard(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, compression: str) -> None:
    content = COMPRESS[compression](CONTENTS[name])
    for path in (tmp_path / f"{name}{compression}", tmp_path / f"{name}{compression}".upper()):
        assert load_documents(write(path, content)) == TEXTS
        assert str(path) in fails(str(path), field="body")


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
def test_text_is_one_document_when_compressed_too(tmp_path: Path, suffix: str, compression: str) -> None:
    content = COMPRESS[compression]("one\n\ntwo é\n".encode())
    assert load_documents(write(tmp_path / f"a{suffix}{compression}", content)) == ["one\n\ntwo é\n"]


@pytest.mark.parametrize("name", [*CONTENTS, "a.txt"])
@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_compressed_files(tmp_path: Path, name: str, compression: str) -> None:
    whole = COMPRESS[compression](CONTENTS.get(name, LINES_OF))
    for content in (b"it is not", whole[: len(whole) // 2]):
        path = write(tmp_path / f"{name}{compression}", content)
        assert f"{path}: cannot be read: " in fails(path)


def test_pointers_of_git_lfs(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    for name in ("a.txt", "a.jsonl"):
        assert f"{name}: a pointer of git-lfs" in fails(write(tmp_path / name, pointer))


@pytest.mark.parametrize("missing", ["./calibration", "/nowhere/at/all", "text.jsonl", "data/more/text", "~/no such"])
def test_a_missing_file(missing: str) -> None:
    assert "file or folder not found" in fails(missing)


def test_an_unknown_purpose() -> None:
    for use in (TextSource(dataset="stdlib").documents, TextSource(dataset="stdlib").separator):
        with pytest.raises(DataError, match="unknown purpose 'calib'; did you mean 'calibration'"):
            use("calib")  # type: ignore[arg-type]


def test_what_has_no_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x")
    assert "a file has no split 'train'; omit `split`" in fails(path, split="train")
    assert "local files have no subset 'en'" in fails(path, subset="en")
    assert "no split 'train': no file name has a split" in fails(str(tmp_path), split="train")


def folder_of(root: Path, *names: str) -> str:
    """Write files whose text is their name."""
    for name in names:
        jsonl(root / name, {"text": name})
    return str(root)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], ["test-00000-of-00001.jsonl"]),
        (["data/train-00000-of-00001.jsonl"], ["data/validation-00000-of-00001.jsonl"]),
        (["en/c4-train.00000-of-01024.jsonl"], ["en/c4-validation.00000-of-00008.jsonl"]),
        (["train/0.jsonl", "train/more/1.jsonl"], ["test/0.jsonl"]),
        (["train.jsonl"], ["dev.jsonl"]),
        (["my_training_1.jsonl"], ["my_Eval.jsonl"]),
    ],
)
def test_names_as_on_the_hub_are_splits(tmp_path: Path, train: list[str], test: list[str]) -> None:
    folder = folder_of(tmp_path, *train, *test)
    assert load_documents(folder) == load_documents(folder, split="train") == train
    assert load_documents(folder, purpose="evaluation") == test
    assert "no split 'trian'; did you mean 'train'?" in fails(folder, split="trian")
    assert not TextSource(dataset=folder).shares_text(TextSource(dataset=folder))
    assert TextSource(dataset=folder).shares_text(TextSource(dataset=folder, split="train"))
    assert TextSource(dataset=folder).shares_text(TextSource(dataset=str(tmp_path / train[0])))


def test_a_folder_of_one_split_is_read_whole(tmp_path: Path) -> None:
    names = ["notes.jsonl", "test-1.jsonl"]
    folder = folder_of(tmp_path, *names)
    assert load_documents(folder) == names
    assert load_documents(folder, split="test") == names[1:]


def test_splits_that_have_to_be_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "test-1.jsonl", "validation-1.jsonl")
    assert "no train split; set `split` to one of test, validation" in fails(folder)
    folder_of(tmp_path, "train-1.jsonl", "more.jsonl")
    assert "but more.jsonl belongs to none; set `split`" in fails(folder)
    assert load_documents(folder, split="train") == ["train-1.jsonl"]
    (tmp_path / "more.jsonl").rename(tmp_path / "random-00000-of-00001.jsonl")
    assert load_documents(folder, split="random") == ["more.jsonl"]


def test_a_saved_dataset(tmp_path: Path) -> None:
    """What `save_to_disk` writes, alone and as a dictionary of splits; a description is no text."""
    one, two = (datasets.Dataset.from_list([{"text": text}]) for text in ("1", "2"))
    one.save_to_disk(str(tmp_path / "alone"))
    assert load_documents(str(tmp_path / "alone")) == ["1"]
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "both"))
    write(tmp_path / "both" / "README.md", "what it is")
    assert load_documents(str(tmp_path / "both")) == ["1"]
    assert load_documents(str(tmp_path / "both"), purpose="evaluation") == ["2"]


def test_nothing_in_a_folder_is_skipped_in_silence(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "text", "a.jsonl")
    outside = folder_of(tmp_path / "outside", "b.jsonl")
    link = tmp_path / "text" / "linked"
    link.symlink_to(outside)
    assert load_documents(folder) == ["a.jsonl", "b.jsonl"]
    link.unlink()
    link.symlink_to(folder)
    assert "linked: the same folder as" in fails(folder)
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    assert "linked: a link to a file that does not exist; move it out of" in fails(folder)
    link.unlink()
    os.mkfifo(link.with_suffix(".jsonl"))
    assert "linked.jsonl: not a regular file" in fails(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is hidden from root")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.jsonl", "b/c.jsonl")
    for name, message in (("a.jsonl", "a.jsonl: no permission"), ("b", "b: the folder cannot be read: Permission")):
        (tmp_path / name).chmod(0)
        assert message in fails(folder)
        (tmp_path / name).chmod(0o700)


def test_a_misspelt_name_is_known_without_a_network() -> None:
    for name in ("wikitext", "stdlb"):
        with pytest.raises(DataError, match=f"unknown dataset '{name}'; did you mean '.*'.*owner/name"):
            TextSource(dataset=name).check("calibration")


def test_named_datasets_check_their_options() -> None:
    assert "stdlib: unknown split 'held_out'; did you mean 'heldout'?" in fails("stdlib", split="held_out")
    assert "c4: unknown split 'test' (known: train, validation)" in fails("c4", split="test")
    assert "wikitext2: it has no subsets" in fails("wikitext2", subset="x")
    assert "stdlib: no field 'code' (known: text)" in fails("stdlib", field="code")


def test_a_name_comes_before_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "stdlib" / "a.txt", "mine")
    assert load_documents("./stdlib") == ["mine"]
    assert load_documents("stdlib") != ["mine"]


@pytest.mark.parametrize(("name", "named"), DATASETS.items())
def test_named_datasets_are_whole(name: str, named: NamedDataset) -> None:
    assert named.description
    assert "\n" not in named.description
    assert {named.calibration_split, named.evaluation_split} <= set(named.splits)
    assert named.calibration_split != named.evaluation_split
    if named.files:
        assert set(named.files) == set(named.splits)
    TextSource(dataset=name).check("calibration")


def test_the_protocol_of_the_released_code() -> None:
    """Its lib/data.py: splits, and what joins documents for calibration and for evaluation."""
    protocol = {
        "wikitext2": ("train", " ", "test", "\n\n"),
        "ptb": ("train", " ", "validation", "\n\n"),
        "c4": ("train", None, "validation", " "),
    }
    for name, expected in protocol.items():
        named, source = DATASETS[name], TextSource(dataset=name)
        assert (
            named.calibration_split,
            source.separator("calibration"),
            named.evaluation_split,
            source.separator("evaluation"),
        ) == expected


def test_other_documents_are_joined_by_an_empty_line() -> None:
    for name in ("stdlib", "owner/name", "a.txt"):
        assert (
            TextSource(dataset=name).separator("calibration")
            == TextSource(dataset=name).separator("evaluation")
            == "\n\n"
        )


def test_named_hub_datasets(hub: Hub) -> None:
    hub.add("Salesforce/wikitext", train=[{"text": ""}, {"text": "= A ="}], test=[{"text": "B"}])
    hub.add("ptb-text-only/ptb_text_only", train=[{"sentence": "a"}], validation=[{"sentence": "b"}])
    hub.add("allenai/c4", validation=[{"text": str(number), "url": "u"} for number in range(1103)])
    assert load_documents("wikitext2") == ["", "= A ="]
    assert load_documents("wikitext2", purpose="evaluation") == ["B"]
    assert load_documents("ptb", purpose="evaluation") == ["b"]
    assert load_documents("c4", purpose="evaluation") == [str(number) for number in range(1100)]
    assert load_documents("c4", split="validation")[-1] == "1102"
    shard = "en/c4-validation.00000-of-00008.json.gz"
    assert hub.calls[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None, None)
    assert hub.calls[2] == ("ptb-text-only/ptb_text_only", None, "validation", "refs/convert/parquet", None)
    assert hub.calls[3] == ("allenai/c4", None, "validation", None, {"validation": shard})


def test_a_hub_dataset_chooses_its_split_by_purpose(hub: Hub) -> None:
    hub.add("me/text", train=[{"text": "a"}], test=[{"text": "b"}], validation=[{"text": "c"}])
    assert load_documents("me/text") == ["a"]
    assert load_documents("me/text", purpose="evaluation") == ["b"]
    assert load_documents("me/text", purpose="evaluation", split="validation") == ["c"]


def test_evaluation_never_falls_back_to_the_training_split(hub: Hub) -> None:
    hub.add("me/text", train=[{"text": "a"}])
    message = fails("me/text", purpose="evaluation")
    assert "me/text: no test or validation or heldout split; set `split` to one of train" in message


def test_a_hub_chat(hub: Hub) -> None:
    hub.add("me/chat", train=[{"id": "1", "messages": CHAT}])
    assert load_documents("me/chat", render=render) == ["user:hi|assistant:hello"]
    assert "me/chat: row 0 of train: this is a conversation" in fails("me/chat")
    assert "me/chat: no field 'message'; did you mean 'messages'?" in fails("me/chat", field="message")


def test_an_unknown_split_on_the_hub(hub: Hub) -> None:
    hub.add("me/text", train=[{"text": "a"}])
    assert "Unknown split \"dev\". Should be one of ['train']" in fails("me/text", split="dev")


def test_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach it on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    for options in ({}, {"split": "train"}):
        message = fails("me/text", **options)
        assert "the Hugging Face hub cannot be reached" in message
        assert "use `stdlib` or local files" in message
    assert "wikitext2: " in fails("wikitext2")


def test_the_hub_knows_no_such_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'me/wikitext2' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert "unknown dataset 'me/wikitext2'; did you mean 'wikitext2'?" in fails("me/wikitext2", split="train")


def test_the_standard_library_is_split_by_module() -> None:
    train, heldout = stdlib_documents("train"), stdlib_documents("heldout")
    assert load_documents("stdlib") == train
    assert load_documents("stdlib", purpose="evaluation") == heldout
    assert not set(filter(str.strip, train)) & set(filter(str.strip, heldout))
    assert 0.02 < sum(map(len, heldout)) / sum(map(len, train)) < 0.3
    modules = stdlib_modules()
    assert {"json", "argparse"} <= modules.keys()
    assert not {"test", "encodings", "site-packages"} & modules.keys()
    assert len(train) == sum(len(paths) for module, paths in modules.items() if not is_held_out(module))
