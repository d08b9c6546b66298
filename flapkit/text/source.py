"""Read documents from named datasets, the Hugging Face hub, local files and folders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flapkit.system.errors import DataError, InputError, closest, did_you_mean
from flapkit.system.options import PathText, Section
from flapkit.system.paths import to_path
from flapkit.system.sizes import counted
from flapkit.text.conversations import Conversation, is_conversation, normalise
from flapkit.text.files import KNOWN, format_of, size_of_text
from flapkit.text.named import DATASETS, DEFAULT_SEPARATOR, NamedDataset, Purpose
from flapkit.text.places import HubText, LocalText, Place, StdlibText

Render = Callable[[Conversation], str]

TEXT_FIELDS = ("text", "conversations", "messages")
"""The fields to look for, in this order, if a recipe names none."""

DEFAULT_SPLITS: Mapping[Purpose, tuple[str, ...]] = {
    "calibration": ("train",),
    "evaluation": ("test", "validation", "heldout"),
}
"""The splits of a hub dataset or a folder to look for, in this order, if a recipe names none."""

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
        self._place(purpose).check(self._field)

    def separator(self, purpose: Purpose) -> str | None:
        """Return the text between documents; None to draw each window within one document."""
        _check_purpose(purpose)
        named = DATASETS.get(self.dataset)
        return DEFAULT_SEPARATOR if named is None else named.separator(purpose)

    def shares_text(self, evaluation: TextSource) -> bool:
        """Return whether this calibration or training text is also evaluated, judging by names and paths.

        Args:
            evaluation: the source of the evaluation text.
        """
        own, other = self._place("calibration").files(), evaluation._place("evaluation").files()
        if own and other:
            return not {path.resolve() for path in own}.isdisjoint(path.resolve() for path in other)
        return self._name("calibration") == evaluation._name("evaluation")

    def documents(self, purpose: Purpose, render: Render | None = None) -> list[str]:
        """Read the documents.

        Args:
            purpose: ``calibration``, also for training text, or ``evaluation``; selects the default split.
            render: renders a conversation as text; None if the model has no format for conversations.

        Raises:
            DataError: the data cannot be found or read, or has no text.
        """
        rows = self._place(purpose).rows(self._field)
        documents = [self._document(value, where, render) for value, where in rows]
        if not any(document.strip() for document in documents):
            amount = f"{counted(len(documents), 'document')}, all empty" if documents else "it has no rows"
            raise DataError(f"{self.dataset}: no text: {amount}")
        return documents

    def size(self, purpose: Purpose) -> int | None:
        """Return about how many bytes of text there are; None if the text is not on this machine."""
        files = self._place(purpose).files()
        return sum(map(size_of_text, files)) if files else None

    def _place(self, purpose: Purpose) -> Place:
        """Return where the text lies.

        Raises:
            DataError: there is no such dataset, file, subset or split.
        """
        _check_purpose(purpose)
        usual, named = DEFAULT_SPLITS[purpose], DATASETS.get(self.dataset)
        if named:
            return self._named_place(named, purpose)
        path = self._path()
        if path is None:
            return HubText(self.dataset, self.dataset, self.subset, self.split, usual)
        if self.subset is not None:
            raise DataError(f"{path}: local files have no subset {self.subset!r}; omit `subset`")
        return LocalText(path, self.split, usual)

    def _named_place(self, named: NamedDataset, purpose: Purpose) -> Place:
        if self.subset is not None:
            raise DataError(f"{self.dataset}: it has no subsets; omit `subset`, or give the hub id instead of the name")
        if self.split is not None and self.split not in named.splits:
            raise DataError(f"{self.dataset}: unknown split {self.split!r}{did_you_mean(self.split, named.splits)}")
        split = self.split or named.usual_split(purpose)
        if named.hub is None:
            return StdlibText(self.dataset, split)
        file = named.files[split] if named.files else None
        limit = named.evaluation_documents if purpose == "evaluation" else None
        return HubText(self.dataset, named.hub, named.subset, split, (split,), named.revision, file, limit)

    def _name(self, purpose: Purpose) -> tuple[str, str | None, str | None]:
        named = DATASETS.get(self.dataset)
        usual = named.usual_split(purpose) if named else DEFAULT_SPLITS[purpose][0]
        return self.dataset, self.subset, self.split or usual

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

    def _field(self, fields: Collection[str], where: str) -> str:
        if self.field is not None and self.field not in fields:
            raise DataError(f"{where}: no field {self.field!r}{did_you_mean(self.field, fields)}")
        named = DATASETS.get(self.dataset)
        usual = (named.field, *TEXT_FIELDS) if named else TEXT_FIELDS
        chosen = self.field or next((name for name in usual if name in fields), None)
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
