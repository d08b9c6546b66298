from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from flapkit.system.errors import DataError
from flapkit.text.source import (
    DATASETS,
    NamedDataset,
    Purpose,
    TextSource,
    is_held_out,
    stdlib_documents,
    stdlib_modules,
)

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
    assert "no text: all 2 documents are empty" in fails(jsonl(tmp_path / "a.jsonl", {"text": ""}, {"text": " \n"}))
    assert "no text: it has no rows" in fails(write(tmp_path / "b.jsonl", ""))


def test_broken_files(tmp_path: Path) -> None:
    assert "a.jsonl:2: not JSON" in fails(write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": \n'))
    assert "b.jsonl:1: expected an object with a text field, found list" in fails(write(tmp_path / "b.jsonl", "[1]"))
    for name in ("c.txt", "c.jsonl"):
        assert f"{name}: not UTF-8" in fails(write(tmp_path / name, b'{"text": "caf\xe9"}'))
    assert "d.parquet: cannot be read" in fails(write(tmp_path / "d.parquet", "PAR1 it is not"))


def test_other_files(tmp_path: Path) -> None:
    assert "a.csv: not a .txt, .jsonl, .parquet file" in fails(write(tmp_path / "a.csv", "x"))
    message = fails(str(tmp_path))
    assert "a.csv: not a .txt, .jsonl, .parquet file; move it out of" in message
    (tmp_path / "empty").mkdir()
    assert "the folder has no .txt, .jsonl, .parquet files" in fails(str(tmp_path / "empty"))


@pytest.mark.parametrize("missing", ["./calibration", "/nowhere/at/all", "text.jsonl", "data/more/text", "~/no such"])
def test_a_missing_file(missing: str) -> None:
    assert "file or folder not found" in fails(missing)


def test_local_files_have_no_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x")
    assert "local files have no split 'train'; omit `split`" in fails(path, split="train")
    assert "local files have no subset 'en'" in fails(path, subset="en")


def test_a_misspelt_name_is_known_without_a_network() -> None:
    for name in ("wikitext", "stdlb"):
        with pytest.raises(DataError, match=f"unknown dataset '{name}'; did you mean '.*'.*owner/name"):
            TextSource(dataset=name).check()


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
    TextSource(dataset=name).check()


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
