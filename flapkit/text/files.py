"""Local files of text: their formats, the splits of a folder, and their rows."""

from __future__ import annotations

import bz2
import gzip
import io
import logging
import lzma
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, TextIO

from flapkit.system.errors import DataError, did_you_mean
from flapkit.system.json_files import parse_json

ChooseField = Callable[[Collection[str], str], str]
"""Chooses the field with the text from the fields of a row, given the row's name for error messages."""

DOCUMENTS = (".txt", ".md")
LINES = (".jsonl", ".ndjson")
TABLES = (".json", ".csv", ".tsv", ".arrow", ".parquet")
FORMATS = (*DOCUMENTS, *LINES, *TABLES)
"""Suffixes of the files that are read, in lower or upper case."""


def _open_zstandard(path: Path) -> BinaryIO:
    import pyarrow

    # Unlike the package zstandard, it refuses a file that ends too early.
    opened: BinaryIO = pyarrow.input_stream(str(path), compression="zstd")
    return opened


COMPRESSIONS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}
"""Suffix behind a format's -> what opens the file to read bytes."""

KNOWN = f"{', '.join(FORMATS)}, also compressed as {', '.join(COMPRESSIONS)}"

METADATA = frozenset(
    {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
)
"""Files of a dataset's folder that describe the data, by the conventions of the hub and of ``datasets``."""

SPLITS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> words that stand for it in names of files and folders, as on the hub."""

_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}", re.ASCII)
_LFS = "version https://git-lfs.github.com/spec/"

log = logging.getLogger(__name__)


def format_of(path: Path) -> tuple[str, str] | None:
    """Return the suffixes of a file's format and of its compression, in lower case; None if it is not read.

    The second is empty if the file is not compressed.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1], compression) if suffixes and suffixes[-1] in FORMATS else None


def local_files(root: Path) -> list[Path]:
    """Return a file, or the files in a folder and below it, in the order of their paths.

    Hidden files, and those of ``METADATA``, hold no text. Every other file has to be readable.

    Raises:
        DataError: a file of unknown format, a broken link, a file or folder that cannot be read, or no file at all.
    """
    paths = sorted(_walk(root)) if root.is_dir() else [root]
    if not paths:
        raise DataError(f"{root}: the folder has no files with text ({KNOWN})")
    for path in paths:
        where = f"; move it out of {root}, or give a single file" if path != root else ""
        if not path.is_file():
            what = "a link to a file that does not exist" if path.is_symlink() else "not a regular file"
            raise DataError(f"{path}: {what}{where}")
        if format_of(path) is None:
            raise DataError(f"{path}: this format is not read{where}; the formats are {KNOWN}")
        if not os.access(path, os.R_OK):
            raise DataError(f"{path}: no permission to read it{where}")
    return paths


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files in a folder and below it, also behind links to folders."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error

    seen: dict[str, str] = {}
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            raise DataError(f"{folder}: the same folder as {seen[real]}; remove the link, so that it is read once")
        seen[real] = folder
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name in METADATA:
                log.info("%s: describes the data; not read as text", Path(folder, name))
            elif not name.startswith("."):
                yield Path(folder, name)


def choose_split(root: Path, paths: Sequence[Path], split: str | None, usual: Sequence[str]) -> Sequence[Path]:
    """Choose the files of a split, by names as on the hub: ``train-00000-of-00002.parquet``, ``test/a.jsonl``.

    A folder whose names tell no splits apart is read whole.

    Args:
        root: the folder, or a single file.
        paths: the files in it.
        split: the split; None for the usual one.
        usual: the splits to take, the first that is there.

    Raises:
        DataError: the folder does not have the split, or the split has to be given.
    """
    splits: dict[str | None, list[Path]] = {}
    for path in paths if root.is_dir() else ():
        splits.setdefault(split_of(path.relative_to(root)), []).append(path)
    rest = splits.pop(None, [])
    names = [str(name) for name in splits]
    if split is not None:
        if not splits:
            raise DataError(f"{root}: no split {split!r}: no file name has a split; omit `split`")
        if split not in splits:
            raise DataError(f"{root}: no split {split!r}{did_you_mean(split, names)}")
        return splits[split]
    if len(splits) < 2:
        return paths
    if rest:
        raise DataError(
            f"{root}: the file names have splits ({', '.join(names)}), but {rest[0].relative_to(root)} belongs to "
            "none; set `split`, or move this file out of the folder"
        )
    chosen = next((name for name in usual if name in splits), None)
    if chosen is None:
        raise DataError(f"{root}: no {' or '.join(usual)} split; set `split` to one of {', '.join(names)}")
    return splits[chosen]


def split_of(path: Path) -> str | None:
    """Return the split that a file's name says, or else the name of a folder of it, the innermost first.

    Args:
        path: relative to the folder of the dataset.
    """
    for name in reversed(path.parts):
        for split, words in SPLITS.items():
            if re.search(rf"(?:^|[-._ 0-9])(?:{'|'.join(words)})(?:[-._ 0-9]|$)", name, re.IGNORECASE):
                return split
    shard = _SHARD.match(path.name)
    return shard[1] if shard else None


def size_of_text(path: Path) -> int:
    """Return about how many bytes of text are in a file of a known format."""
    suffix, compression = format_of(path) or ("", "")
    # As measured on English text and source code; tables compress their columns.
    return path.stat().st_size * (4 if compression else 2 if suffix == ".parquet" else 1)


def read_rows(path: Path, choose: ChooseField) -> Iterator[tuple[Any, str]]:
    """Read a file: text is one row; JSON lines and the rows of tables are a row each.

    Args:
        path: a file of a known format.
        choose: chooses the field.

    Yields:
        The chosen field of every row, and the row's name for error messages.

    Raises:
        DataError: the file cannot be read.
    """
    suffix, compression = format_of(path) or ("", "")
    try:
        with COMPRESSIONS[compression](path) if compression else path.open("rb") as file:
            if suffix in DOCUMENTS:
                choose({"text"}, str(path))
                with io.TextIOWrapper(file, encoding="utf-8-sig") as decoded:
                    text = decoded.read()
                _check_present(text, path)
                yield text, str(path)
            elif suffix in LINES:
                with io.TextIOWrapper(file, encoding="utf-8-sig") as decoded:
                    yield from _lines(path, decoded, choose)
            else:
                with _plain(path, suffix, file if compression else None) as plain:
                    for number, value in enumerate(_TABLES[suffix](plain, choose, str(path))):
                        yield value, f"{path}: row {number}"
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}; convert it to UTF-8") from error
    except Exception as error:
        # Readers and decompressors have errors of their own.
        raise DataError(f"{path}: cannot be read: {str(error) or type(error).__name__}") from error


def _check_present(text: str, path: Path) -> None:
    if text.startswith(_LFS):
        raise DataError(f"{path}: a pointer of git-lfs in place of the file; download it with `git lfs pull`")


@contextmanager
def _plain(path: Path, suffix: str, unpacked: BinaryIO | None) -> Iterator[Path]:
    """Make a file not compressed, under a name of its own: readers give some characters of names a meaning."""
    with TemporaryDirectory() as folder:
        plain = Path(folder, f"text{suffix}")
        if unpacked is None:
            plain.symlink_to(path.absolute())
        else:
            with plain.open("wb") as copy:
                shutil.copyfileobj(unpacked, copy)
        yield plain


def _lines(path: Path, lines: TextIO, choose: ChooseField) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(lines, start=1):
        _check_present(line, path)
        if line.strip():
            where = f"{path}:{number}"
            row = _json_row(line, where)
            yield row[choose(row, where)], where


def _json_row(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with a text field, found {type(row).__name__}")
    return row


def _json(plain: Path, choose: ChooseField, where: str) -> Iterator[Any]:
    """Read an array of objects, or one object a line."""
    import datasets

    # As a stream, so that no copy of it is written into the cache of `datasets`.
    rows = datasets.load_dataset("json", data_files=[str(plain)], split="train", streaming=True)
    with closing(iter(rows)) as stream:
        for number, row in enumerate(stream):
            yield row[choose(row, f"{where}: row {number}")]


def _csv(plain: Path, choose: ChooseField, where: str) -> Iterator[Any]:
    import pandas

    # Whatever is in a cell is text: numbers, nothing, and `NA`.
    options: Any = {"sep": "\t" if plain.suffix == ".tsv" else ",", "dtype": str, "na_filter": False}
    chosen = choose(list(pandas.read_csv(plain, nrows=0, **options).columns), where)
    yield from pandas.read_csv(plain, usecols=[chosen], **options)[chosen]


def _arrow(plain: Path, choose: ChooseField, where: str) -> Iterator[Any]:
    import pyarrow

    with pyarrow.OSFile(str(plain)) as file:
        try:
            table = pyarrow.ipc.open_stream(file).read_all()
        except pyarrow.ArrowInvalid:
            file.seek(0)
            table = pyarrow.ipc.open_file(file).read_all()
    # Damaged offsets would be followed out of the buffers.
    table.validate(full=True)
    yield from table.column(choose(table.column_names, where)).to_pylist()


def _parquet(plain: Path, choose: ChooseField, where: str) -> Iterator[Any]:
    import pyarrow.parquet

    # Of a table the column with the text alone is read.
    with pyarrow.parquet.ParquetFile(plain) as table:
        chosen = choose(table.schema_arrow.names, where)
        values = table.read(columns=[chosen]).column(chosen).to_pylist()
    yield from values


_TABLES: Mapping[str, Callable[[Path, ChooseField, str], Iterator[Any]]] = {
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".arrow": _arrow,
    ".parquet": _parquet,
}
