"""Read documents from named datasets, the Hugging Face hub, local files and folders."""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from flapkit.system.errors import DataError, InputError, closest, did_you_mean
from flapkit.system.options import PathText, Section
from flapkit.system.paths import to_path
from flapkit.system.sizes import counted
from flapkit.text.conversations import Conversation, is_conversation, normalise
from flapkit.text.files import KNOWN, choose_split, format_of, local_files, read_rows, size_of_text

Purpose = Literal["calibration", "evaluation"]
Render = Callable[[Conversation], str]

TEXT_FIELDS = ("text", "conversations", "messages")
"""The fields to look for, in this order, if a recipe names none."""

DEFAULT_SEPARATOR = "\n\n"
DEFAULT_SPLITS: Mapping[Purpose, tuple[str, ...]] = {
    "calibration": ("train",),
    "evaluation": ("test", "validation", "heldout"),
}
"""The splits of a hub dataset or a folder to look for, in this order, if a recipe names none."""


@dataclass(frozen=True, slots=True)
class NamedDataset:
    """A dataset with a short name for recipes.

    Args:
        description: one line for ``flapkit list datasets``.
        calibration_split: the split to calibrate on.
        evaluation_split: the split to measure perplexity on.
        splits: all splits.
        calibration_separator: text between documents when calibration windows are drawn; None to draw each window
            within one document.
        evaluation_separator: text between documents when evaluation windows are cut.
        evaluation_documents: number of documents to evaluate, from the first; None for all.
        hub: hub id, or None if the text is on this machine.
        subset: configuration on the hub.
        revision: branch on the hub.
        field: the field with the text.
        files: split -> file on the hub, if one shard is enough.
    """

    description: str
    calibration_split: str
    evaluation_split: str
    splits: tuple[str, ...] = ("train", "validation", "test")
    calibration_separator: str | None = DEFAULT_SEPARATOR
    evaluation_separator: str = DEFAULT_SEPARATOR
    evaluation_documents: int | None = None
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    field: str = "text"
    files: Mapping[str, str] | None = None


# Splits, separators and amounts are those of FLAP's released code, for comparison with its published numbers.
DATASETS: Mapping[str, NamedDataset] = {
    "wikitext2": NamedDataset(
        description="WikiText-2, raw: Wikipedia articles, from the Hugging Face hub",
        calibration_split="train",
        evaluation_split="test",
        calibration_separator=" ",
        hub="Salesforce/wikitext",
        subset="wikitext-2-raw-v1",
    ),
    "ptb": NamedDataset(
        description="Penn Treebank: sentences of the Wall Street Journal, from the Hugging Face hub",
        calibration_split="train",
        evaluation_split="validation",
        calibration_separator=" ",
        hub="ptb-text-only/ptb_text_only",
        # The main branch is a loading script, which `datasets` no longer runs since version 4.
        revision="refs/convert/parquet",
        field="sentence",
    ),
    "c4": NamedDataset(
        description="C4, English: web pages; the first shard of each split, from the Hugging Face hub",
        calibration_split="train",
        evaluation_split="validation",
        splits=("train", "validation"),
        calibration_separator=None,
        evaluation_separator=" ",
        evaluation_documents=1100,
        hub="allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "stdlib": NamedDataset(
        description="The sources of Python's own standard library: on every machine, without a network",
        calibration_split="train",
        evaluation_split="heldout",
        splits=("train", "heldout"),
    ),
}
"""The datasets that recipes can name."""


DATASET = (
    f"A dataset by name (`flapkit list datasets`), a hub id, or a local file or folder ({KNOWN}), relative to the "
    "current directory."
)
"""What a dataset's name in a recipe may be."""

Dataset = Annotated[PathText, Field(description=DATASET)]
Subset = Annotated[str | None, Field(description="Configuration of a hub dataset.")]
Split = Annotated[
    str | None,
    Field(
        description="Split of the dataset, or of a folder with names as on the hub, such as `train-*` and `test-*`; "
        "the usual one if not given."
    ),
]
TextField = Annotated[
    str | None, Field(description="Field that holds the text or the conversation; detected if not given.")
]


class TextSource(Section):
    """Where text comes from.

    ``dataset`` is looked up in this order: a name of ``DATASETS``; a local file of text (one document) or of rows (one
    document per row), or a folder of such files (``flapkit.text.files``), read in the order of their paths; a hub id.
    Write ``./name`` for a folder that has the name of a named dataset. The default of ``split`` is the usual one for
    the purpose; the default of ``field`` is the first of ``TEXT_FIELDS`` that a row has.
    """

    dataset: Dataset
    subset: Subset = None
    split: Split = None
    field: TextField = None

    def check(self, purpose: Purpose) -> None:
        """Raise ``DataError`` for errors that can be found without a network and without reading text."""
        _check_purpose(purpose)
        named = DATASETS.get(self.dataset)
        if named:
            self._check_named(named)
        elif self._path() is not None:
            self._local_files(purpose)

    def separator(self, purpose: Purpose) -> str | None:
        """Return the text between documents; None to draw each window within one document."""
        _check_purpose(purpose)
        named = DATASETS.get(self.dataset)
        if named is None:
            return DEFAULT_SEPARATOR
        return named.calibration_separator if purpose == "calibration" else named.evaluation_separator

    def shares_text(self, evaluation: TextSource) -> bool:
        """Return whether this calibration or training text is also evaluated, judging by names and paths.

        Args:
            evaluation: the source of the evaluation text.
        """
        own, other = self._resolved("calibration"), evaluation._resolved("evaluation")
        if own is not None and other is not None:
            return not own.isdisjoint(other)
        return self._place("calibration") == evaluation._place("evaluation")

    def _resolved(self, purpose: Purpose) -> set[Path] | None:
        """Return the files that are read; None if they are not on this machine, or belong to a named dataset."""
        if self.dataset in DATASETS or self._path() is None:
            return None
        return {path.resolve() for path in self._local_files(purpose)}

    def _place(self, purpose: Purpose) -> tuple[str, str | None, str | None]:
        named = DATASETS.get(self.dataset)
        usual = _split(named, purpose) if named else DEFAULT_SPLITS[purpose][0]
        return self.dataset, self.subset, self.split or usual

    def documents(self, purpose: Purpose, render: Render | None = None) -> list[str]:
        """Read the documents.

        Args:
            purpose: ``calibration``, also for training text, or ``evaluation``; selects the default split.
            render: renders a conversation as text; None if the model has no format for conversations.

        Raises:
            DataError: the data cannot be found or read, or has no text.
        """
        self.check(purpose)
        documents = [self._document(value, where, render) for value, where in self._values(purpose)]
        if not any(document.strip() for document in documents):
            amount = f"{counted(len(documents), 'document')}, all empty" if documents else "it has no rows"
            raise DataError(f"{self.dataset}: no text: {amount}")
        return documents

    def _values(self, purpose: Purpose) -> Iterator[tuple[Any, str]]:
        """Yield the selected field of every row, and the row's name for error messages."""
        named = DATASETS.get(self.dataset)
        if named and named.hub is None:
            for number, text in enumerate(stdlib_documents(self.split or _split(named, purpose))):
                yield text, f"{self.dataset}: file {number}"
        elif named:
            amount = named.evaluation_documents if purpose == "evaluation" else None
            yield from self._hub_values(named, self.split or _split(named, purpose), amount)
        elif self._path() is not None:
            for path in self._local_files(purpose):
                yield from read_rows(path, self._field)
        else:
            hub = NamedDataset("", "", "", hub=self.dataset, subset=self.subset)
            yield from self._hub_values(hub, self.split or self._hub_split(purpose))

    def size(self, purpose: Purpose) -> int | None:
        """Return about how many bytes of text there are; None if the text is not on this machine."""
        named = DATASETS.get(self.dataset)
        if named and named.hub is None:
            return sum(path.stat().st_size for path in _stdlib_files(self.split or _split(named, purpose)))
        if named or self._path() is None:
            return None
        return sum(map(size_of_text, self._local_files(purpose)))

    def _check_named(self, named: NamedDataset) -> None:
        if self.subset is not None:
            raise DataError(f"{self.dataset}: it has no subsets; omit `subset`, or give the hub id instead of the name")
        if self.split is not None and self.split not in named.splits:
            raise DataError(f"{self.dataset}: unknown split {self.split!r}{did_you_mean(self.split, named.splits)}")
        if self.field is not None and self.field != named.field and named.hub is None:
            raise DataError(f"{self.dataset}: no field {self.field!r}{did_you_mean(self.field, [named.field])}")

    def _path(self) -> Path | None:
        """Return the local path, or None for a hub id."""
        path = self._reach()
        if path.exists():
            return path
        close = closest(self.dataset, DATASETS)
        if "/" not in self.dataset and close and format_of(path) is None:
            raise DataError(
                f"unknown dataset {self.dataset!r}{did_you_mean(self.dataset, DATASETS)}; "
                "write a hub id as owner/name, or give the path of an existing file or folder"
            )
        if self.dataset.startswith((".", "/", "~")) or format_of(path) or self.dataset.count("/") > 1:
            raise DataError(f"{path.absolute()}: file or folder not found{did_you_mean(self.dataset, DATASETS)}")
        return None

    def _reach(self) -> Path:
        try:
            return to_path(self.dataset)
        except InputError as error:
            raise DataError(str(error)) from error

    def _local_files(self, purpose: Purpose) -> Sequence[Path]:
        root = self._reach()
        if self.subset is not None:
            raise DataError(f"{root}: local files have no subset {self.subset!r}; omit `subset`")
        if root.is_file() and self.split is not None:
            raise DataError(f"{root}: a file has no split {self.split!r}; omit `split`, or give the folder")
        return choose_split(root, local_files(root), self.split, DEFAULT_SPLITS[purpose])

    def _hub_values(self, hub: NamedDataset, split: str, amount: int | None = None) -> Iterator[tuple[Any, str]]:
        import datasets

        # A single file of a split does not match the sizes and checksums that the hub records.
        files = {"data_files": {split: hub.files[split]}, "verification_mode": "no_checks"} if hub.files else {}
        try:
            rows = datasets.load_dataset(hub.hub, hub.subset, split=split, revision=hub.revision, **files)
        except Exception as error:
            raise self._hub_error(error) from error
        chosen = self._field(rows.column_names, self.dataset, hub.field if hub.field in rows.column_names else None)
        for number, value in enumerate(rows[chosen][:amount]):
            yield value, f"{self.dataset}: row {number} of {split}"

    def _hub_split(self, purpose: Purpose) -> str:
        import datasets

        try:
            splits = datasets.get_dataset_split_names(self.dataset, self.subset)
        except Exception as error:
            raise self._hub_error(error) from error
        wanted = DEFAULT_SPLITS[purpose]
        for split in wanted:
            if split in splits:
                return split
        raise DataError(f"{self.dataset}: no {' or '.join(wanted)} split; set `split` to one of {', '.join(splits)}")

    def _hub_error(self, error: Exception) -> DataError:
        if isinstance(error, ConnectionError):
            what = "" if self.dataset in DATASETS else "not a local file or folder, and "
            return DataError(
                f"{self.dataset}: {what}the Hugging Face hub cannot be reached, and the dataset is not in its cache: "
                f"{error}; without a network, use `stdlib` or local files"
            )
        if isinstance(error, FileNotFoundError):
            return DataError(f"unknown dataset {self.dataset!r}{did_you_mean(self.dataset, DATASETS)}: {error}")
        # The messages of `datasets` list the available subsets and splits.
        return DataError(f"{self.dataset}: cannot be loaded from the hub: {type(error).__name__}: {error}")

    def _field(self, fields: Collection[str], where: str, default: str | None = None) -> str:
        if self.field is not None and self.field not in fields:
            raise DataError(f"{where}: no field {self.field!r}{did_you_mean(self.field, fields)}")
        chosen = self.field or default or next((name for name in TEXT_FIELDS if name in fields), None)
        if chosen is None:
            raise DataError(
                f"{where}: none of the fields ({', '.join(fields)}) is one of {', '.join(TEXT_FIELDS)}; "
                "set `field` to the field with the text"
            )
        return chosen

    def _document(self, value: Any, where: str, render: Render | None) -> str:
        if isinstance(value, str):
            return value
        if not is_conversation(value):
            found = "nothing (null)" if value is None else f"a {type(value).__name__}"
            raise DataError(f"{where}: expected text, or a conversation as a list of messages; found {found}")
        if not value:
            return ""
        conversation = normalise(value, where)
        if render is None:
            raise DataError(
                f"{where}: this is a conversation, but the model has no format for conversations; use an adapter that "
                "has one (for example `adapter: vicuna`), a model whose tokenizer has a chat template, or a field of "
                "plain text"
            )
        try:
            return render(conversation)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


def _check_purpose(purpose: str) -> None:
    if purpose not in DEFAULT_SPLITS:
        raise DataError(f"unknown purpose {purpose!r}{did_you_mean(purpose, DEFAULT_SPLITS)}")


def _split(named: NamedDataset, purpose: Purpose) -> str:
    return named.calibration_split if purpose == "calibration" else named.evaluation_split


_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)
_STDLIB_HELD_OUT_ONE_IN = 10


@cache
def stdlib_modules() -> dict[str, list[Path]]:
    """Map each top-level module of Python's standard library to its source files, in a fixed order.

    Tests, generated tables (``encodings``, ``pydoc_data``, ``_sysconfigdata*``) and installed packages are excluded.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules: dict[str, list[Path]] = {}
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        # Not entered at all: installed packages are many.
        folders[:] = [name for name in folders if name not in _STDLIB_SKIPPED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(files):
        parts = path.relative_to(root).parts
        if parts[0].startswith(("_sysconfigdata", "config-")):
            continue
        modules.setdefault(parts[0].removesuffix(".py"), []).append(path)
    return modules


def is_held_out(module: str) -> bool:
    """Return whether a standard-library module is in the held-out split: one in ten, by a hash of its name."""
    return zlib.crc32(module.encode()) % _STDLIB_HELD_OUT_ONE_IN == 0


def stdlib_documents(split: str) -> list[str]:
    """Read the sources of Python's standard library.

    Args:
        split: ``train``, or ``heldout`` (modules not used for training or calibration).

    Returns:
        One document per source file.
    """
    return [path.read_text(encoding="utf-8") for path in _stdlib_files(split)]


def _stdlib_files(split: str) -> list[Path]:
    """List the files of a split of the standard library, by module."""
    modules = sorted(stdlib_modules().items())
    return [path for module, paths in modules if is_held_out(module) == (split == "heldout") for path in paths]
