"""The files of a finished run that its report is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flapkit.errors import InputError
from flapkit.report.record import ReportRecord

RECORD, BENCH, PAGE = "report.json", "bench.json", "report.html"


@dataclass(frozen=True, slots=True)
class RunDocument:
    """What a run's folder says, without the model.

    Args:
        name: what the run is called: its folder.
        record: ``report.json``.
        result: ``result.json``.
        recipe: ``recipe.yaml``, as text.
        made: ``flapkit.json``: what made the model.
        bench: ``bench.json``, where ``flapkit bench --output`` wrote one into the folder.
    """

    name: str
    record: ReportRecord
    result: Mapping[str, Any]
    recipe: str
    made: Mapping[str, Any]
    bench: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_folder(cls, folder: Path) -> RunDocument:
        """Read a run's folder.

        Raises:
            InputError: a file is missing or damaged.
        """
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder; give the output folder of a run")
        return cls(
            folder.resolve().name,
            ReportRecord.from_json(_read(folder / RECORD), str(folder / RECORD)),
            _read_object(folder / "result.json"),
            _read(folder / "recipe.yaml"),
            _read_object(folder / "flapkit.json"),
            _read_object(folder / BENCH) if (folder / BENCH).exists() else {},
        )


def name_runs(runs: Sequence[RunDocument]) -> list[str]:
    """Name runs by their folders, and number those of one name."""
    names: list[str] = []
    for run in runs:
        same = sum(name.split(" #")[0] == run.name for name in names)
        names.append(f"{run.name} #{same + 1}" if same else run.name)
    return names


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InputError(f"{path}: cannot be read ({reason}); reports are made of a finished run's folder") from error


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object")
    return found
