"""Where text lies: in Python's standard library, in local files, or on the Hugging Face hub."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flapkit.system.errors import DataError, did_you_mean
from flapkit.text.files import ChooseField, choose_split, local_files, read_rows
from flapkit.text.named import DATASETS
from flapkit.text.stdlib import stdlib_documents, stdlib_files


class Place(ABC):
    """Where the rows of a text lie."""

    @abstractmethod
    def rows(self, choose: ChooseField) -> Iterator[tuple[Any, str]]:
        """Yield the text or the conversation of every row, and the row's name for error messages.

        Args:
            choose: chooses the field to read, from the names of all fields and the name of the place.

        Raises:
            DataError: the rows cannot be found or read.
        """

    @abstractmethod
    def files(self) -> Sequence[Path]:
        """Return the files on this machine that are read; none for text of the hub.

        Raises:
            DataError: there are none of such a name or split.
        """

    def check(self, choose: ChooseField) -> None:
        """Raise ``DataError`` for errors that can be found without a network and without reading text."""
        self.files()


@dataclass(frozen=True, slots=True)
class StdlibText(Place):
    """The sources of Python's standard library, one row per file.

    Args:
        name: the dataset's name.
        split: ``train`` or ``heldout``.
    """

    name: str
    split: str

    def rows(self, choose: ChooseField) -> Iterator[tuple[Any, str]]:
        """Yield the text of every file."""
        choose(["text"], self.name)
        for number, text in enumerate(stdlib_documents(self.split)):
            yield text, f"{self.name}: file {number}"

    def files(self) -> Sequence[Path]:
        """Return the files of the split."""
        return stdlib_files(self.split)

    def check(self, choose: ChooseField) -> None:
        """Check the field."""
        choose(["text"], self.name)


@dataclass(frozen=True, slots=True)
class LocalText(Place):
    """A local file of text or rows, or a folder of such files.

    Args:
        root: the file or folder.
        split: the split of a folder; None for the usual one.
        usual: the splits to look for, in this order, if none is given.
    """

    root: Path
    split: str | None
    usual: Sequence[str]

    def rows(self, choose: ChooseField) -> Iterator[tuple[Any, str]]:
        """Yield the rows of every file, in the order of their paths."""
        for path in self.files():
            yield from read_rows(path, choose)

    def files(self) -> Sequence[Path]:
        """Return the files of the split."""
        if self.root.is_file() and self.split is not None:
            raise DataError(f"{self.root}: a file has no split {self.split!r}; omit `split`, or give the folder")
        return choose_split(self.root, local_files(self.root), self.split, self.usual)


@dataclass(frozen=True, slots=True)
class HubText(Place):
    """A dataset on the Hugging Face hub.

    Args:
        name: the name that the recipe uses.
        hub: hub id.
        subset: its configuration.
        split: the split; None for the usual one.
        usual: the splits to look for, in this order, if none is given.
        revision: its branch; None for the main one.
        file: the file to read if the whole split is not needed.
        limit: rows to read, from the first; None for all.
    """

    name: str
    hub: str
    subset: str | None
    split: str | None
    usual: Sequence[str]
    revision: str | None = None
    file: str | None = None
    limit: int | None = None

    def rows(self, choose: ChooseField) -> Iterator[tuple[Any, str]]:
        """Load the split, and yield its rows."""
        import datasets

        split = self.split or self._usual_split()
        # A single file of a split does not match the sizes and checksums that the hub records.
        files = {"data_files": {split: self.file}, "verification_mode": "no_checks"} if self.file else {}
        try:
            rows = datasets.load_dataset(self.hub, self.subset, split=split, revision=self.revision, **files)
        except Exception as error:
            raise self._explain(error) from error
        for number, value in enumerate(rows[choose(rows.column_names, self.name)][: self.limit]):
            yield value, f"{self.name}: row {number} of {split}"

    def files(self) -> Sequence[Path]:
        """Return no files: the hub is not asked."""
        return ()

    def _usual_split(self) -> str:
        import datasets

        try:
            splits = datasets.get_dataset_split_names(self.hub, self.subset)
        except Exception as error:
            raise self._explain(error) from error
        for split in self.usual:
            if split in splits:
                return split
        raise DataError(f"{self.name}: no {' or '.join(self.usual)} split; set `split` to one of {', '.join(splits)}")

    def _explain(self, error: Exception) -> DataError:
        if isinstance(error, ConnectionError):
            what = "" if self.name in DATASETS else "not a local file or folder, and "
            return DataError(
                f"{self.name}: {what}the Hugging Face hub cannot be reached, and the dataset is not in its cache: "
                f"{error}; without a network, use `stdlib` or local files"
            )
        if isinstance(error, FileNotFoundError):
            return DataError(f"unknown dataset {self.name!r}{did_you_mean(self.name, DATASETS)}: {error}")
        # The messages of `datasets` list the available subsets and splits.
        return DataError(f"{self.name}: cannot be loaded from the hub: {type(error).__name__}: {error}")
