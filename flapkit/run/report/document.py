"""Read the files of a finished run that its report uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

import pydantic
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from flapkit.model.budget import Measure
from flapkit.recipe.files import read_settings
from flapkit.run.report.report_record import ReportRecord, Total
from flapkit.system.errors import InputError
from flapkit.system.json_files import first_problem, read_object

RECORD, BENCH, PAGE = "report.json", "bench.json", "report.html"

Figure = Annotated[float, Field(allow_inf_nan=False)]


class _Params(TypedDict):
    dense: Annotated[Total, Field(gt=0)]
    pruned: Total
    blocks: Annotated[Total, Field(gt=0)]
    removed: Total


class _Cost(TypedDict):
    measure: Measure
    detail: str
    dense: Annotated[Figure, Field(gt=0)]
    pruned: Figure
    asked: Figure | None


class _Perplexity(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    dense: float | None
    pruned: float | None
    recovered: float | None
    bits_per_byte: Mapping[str, float | None]


class _Score(TypedDict, total=False):
    value: Figure | None
    stderr: Figure | None


class _Paired(TypedDict, total=False):
    p_value: Figure | None


class _Metric(TypedDict, total=False):
    dense: _Score | None
    pruned: _Score | None
    paired: _Paired | None


class _Task(TypedDict, total=False):
    items: Total | None
    metrics: Mapping[str, _Metric]


Step = Annotated[str, Field(pattern=r"^[0-9]{1,15}$")]


class _Search(TypedDict, total=False):
    objective: str
    best_trial: Total | None
    values: Mapping[Step, Figure | None]
    best_step: Total
    training_loss: Mapping[Step, Figure]
    validation_loss: Mapping[Step, Figure]


class _Result(TypedDict):
    """The part of ``result.json`` that a report uses."""

    params: _Params
    costs: NotRequired[list[_Cost]]
    perplexity: NotRequired[Mapping[str, _Perplexity]]
    zero_shot: NotRequired[Mapping[str, _Task] | None]
    search: NotRequired[_Search]
    seconds: NotRequired[Mapping[str, Annotated[Figure, Field(ge=0)]] | None]
    total_seconds: NotRequired[Annotated[Figure, Field(ge=0)]]
    warnings: NotRequired[list[str]]
    next: NotRequired[Mapping[str, str]]


class _Named(TypedDict):
    name: str


class _Made(TypedDict):
    """The part of ``flapkit.json`` that a report uses."""

    metric: _Named
    searcher: _Named
    compensator: _Named | list[_Named]


class _Bench(TypedDict, total=False):
    """The part of ``bench.json`` that a report uses."""

    ratios: Mapping[str, Figure] | None
    expected: Figure | None


_RESULT, _MADE, _BENCH = (pydantic.TypeAdapter[Any](of) for of in (_Result, _Made, _Bench))


@dataclass(frozen=True, slots=True)
class RunDocument:
    """The files of a run's folder that a report uses.

    Args:
        name: the name of the run's folder.
        record: ``report.json``.
        result: ``result.json``.
        recipe: ``recipe.yaml``, as text.
        made: ``flapkit.json``: how the model was made.
        bench: ``bench.json``, if ``flapkit bench --output`` wrote one into the folder.
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
            raise InputError(f"{folder}: no such folder; give the output folder of a run")
        read_settings(folder / "recipe.yaml")
        return cls(
            folder.resolve().name,
            read_record(folder / RECORD),
            read_result(folder / "result.json"),
            _read(folder / "recipe.yaml"),
            read_made(folder / "flapkit.json"),
            read_checked(folder / BENCH, _BENCH) if (folder / BENCH).exists() else {},
        )


def name_runs(runs: Sequence[RunDocument]) -> list[str]:
    """Name runs by their folders, and number runs of the same name."""
    names: list[str] = []
    for run in runs:
        same = sum(name.split(" #")[0] == run.name for name in names)
        names.append(f"{run.name} #{same + 1}" if same else run.name)
    return names


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(f"{path}: cannot be read ({reason}); give the output folder of a finished run") from error


def read_record(path: Path) -> ReportRecord:
    """Read a run's ``report.json``.

    Raises:
        InputError: the file is damaged.
    """
    return ReportRecord.from_json(_read(path), str(path))


def read_made(path: Path) -> Mapping[str, Any]:
    """Read a run's ``flapkit.json``.

    Raises:
        InputError: the file is damaged.
    """
    return read_checked(path, _MADE)


def read_result(path: Path) -> Mapping[str, Any]:
    """Read a run's ``result.json``.

    Raises:
        InputError: the file is damaged.
    """
    return read_checked(path, _RESULT)


def read_checked(path: Path, of: pydantic.TypeAdapter[Any], raises: type[InputError] = InputError) -> dict[str, Any]:
    """Read a JSON object, and check the part that is used.

    Raises:
        InputError: the file is damaged; or an error of the type ``raises``.
    """
    content = read_object(path, raises)
    try:
        of.validate_python(content, strict=True)
    except pydantic.ValidationError as error:
        raise raises(f"{path}: {first_problem(error)}") from error
    return content
