"""Load the seven tasks of FLAP's paper from local files, for machines without a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flapkit.system.errors import DataError, did_you_mean
from flapkit.system.json_files import parse_json

TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""The tasks by lm-eval's names; a YAML file in ``tasks/`` defines each task's prompt."""

_FOLDER = Path(__file__).parent / "tasks"


@dataclass(frozen=True, slots=True)
class LocalTask:
    """A task with its rows in a local file.

    Args:
        name: lm-eval's name of the task.
        path: the .jsonl file of its rows.
    """

    name: str
    path: Path

    def config(self) -> dict[str, Any]:
        """Return lm-eval's configuration of the task, with the rows.

        Raises:
            DataError: the file cannot be read, or a row has the wrong form.
        """
        config: dict[str, Any] = yaml.safe_load((_FOLDER / f"{self.name}.yaml").read_text(encoding="utf-8"))
        rows = self.rows()
        return {**config, "custom_dataset": lambda **_: _dataset(rows), "num_fewshot": 0}

    def rows(self) -> list[dict[str, Any]]:
        """Read the rows.

        Raises:
            DataError: the file cannot be read, or a row has the wrong form.
        """
        try:
            lines = self.path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: cannot be read: {error}") from error
        rows = [_row(line, f"{self.path}:{number}", self.name) for number, line in enumerate(lines, 1) if line.strip()]
        if not rows:
            raise DataError(f"{self.path}: the file has no rows")
        return rows


def find_task(name: str, folder: Path) -> LocalTask:
    """Find a task's file: the .jsonl whose name starts with the task's name, ignoring underscores, hyphens and case.

    Raises:
        DataError: there is no such file, or more than one.
    """
    if not folder.is_dir():
        raise DataError(f"zero_shot.data_dir: {folder}: folder not found")
    files = sorted(folder.glob("*.jsonl"))
    matching = [path for path in files if _normalised(path.stem).startswith(_normalised(name))]
    if not matching:
        known = [path.name for path in files]
        raise DataError(
            f"{folder}: no file for task {name!r}{did_you_mean(f'{name}.jsonl', known)}; name it {name}.jsonl, or "
            "omit `data_dir` to let lm-eval download the official rows"
        )
    if len(matching) > 1:
        names = ", ".join(path.name for path in matching)
        raise DataError(f"{folder}: {names} all start with {name!r}; keep only one of them")
    return LocalTask(name, matching[0])


def _normalised(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _row(line: str, where: str, task: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    text, options = ("continuation", "context_options") if task == "winogrande" else ("query", "choices")
    expected = f"expected {{{text}: text, {options}: list of texts, gold: index of the correct one}}"
    if not isinstance(row, Mapping) or not isinstance(row.get(text), str) or not _are_texts(row.get(options)):
        raise DataError(f"{where}: {expected}")
    gold = row.get("gold")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(row[options]):
        raise DataError(f"{where}: gold is {gold!r}; {expected}")
    return {text: row[text], options: row[options], "gold": gold}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) and text for text in value)


def _dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
