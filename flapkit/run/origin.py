"""What a pruned checkpoint says beside the model: read, and found to be right, before any work is done on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
from pydantic import ConfigDict
from typing_extensions import TypedDict

from flapkit.checkpoint.folder import MARK, PLAN
from flapkit.model.plan import PruningPlan
from flapkit.recipe.files import read_settings
from flapkit.recipe.schema import Recipe
from flapkit.run.report.document import RECORD, read_made, read_record, read_result
from flapkit.run.report.record import ReportRecord
from flapkit.system.errors import InputError, ModelError
from flapkit.system.json_files import read_object
from flapkit.system.paths import within

RESULT = "result.json"
RECIPE = "recipe.yaml"


class _Model(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    path: str | None


class _Named(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    name: str


class _Mark(TypedDict, total=False):
    """What is read of ``flapkit.json``; there is more in it."""

    files: list[str]
    model: _Model
    metric: _Named | str | None
    searcher: _Named | str | None
    compensator: _Named | str | list[_Named | str] | None


class _Figures(TypedDict):
    """What the figures of a recovered model are put beside."""

    bits_per_byte: Mapping[str, float | None]
    batch_size: Mapping[str, int]


_MARK = pydantic.TypeAdapter(_Mark)
_FIGURES = pydantic.TypeAdapter(dict[str, _Figures])


@dataclass(frozen=True, slots=True)
class Origin:
    """A pruned checkpoint but for its model.

    Args:
        folder: where it is.
        plan: what was kept.
        made: what made it, as ``flapkit.json`` says.
        carried: name -> path of each file that it says it has beside the model: all of them inside it.
        result: what was measured of it, as in ``result.json``; empty where nothing was.
        recipe: the settings of the recipe that made it; empty where there is none.
        record: what its report is made of, if it has one.
    """

    folder: Path
    plan: PruningPlan
    made: Mapping[str, Any]
    carried: Mapping[str, Path]
    result: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    record: ReportRecord | None = None

    @classmethod
    def of(cls, folder: Path) -> Origin:
        """Read a checkpoint.

        Raises:
            InputError: the folder is not one that flapkit wrote, or one of its files is damaged.
        """
        plan, mark = plan_of(folder), read_mark(folder)
        made = {key: value for key, value in mark.items() if key not in ("versions", "files")}
        result, recipe = folder / RESULT, folder / RECIPE
        carried, record = carried_by(folder, mark), None
        if RECORD in carried:
            # The report will be drawn again.
            record = read_record(folder / RECORD)
            read_made(folder / MARK)
        return cls(
            folder,
            plan,
            made,
            carried,
            read_result(result) if result.is_file() or record else {},
            read_settings(recipe) if recipe.is_file() else {},
            record,
        )

    def known(self, asked: Recipe, texts: Collection[str]) -> dict[str, Any]:
        """Return what was measured, without perplexities and scores if a recipe measures other ones.

        Args:
            asked: the recipe.
            texts: the names of its evaluation texts.

        Raises:
            InputError: the perplexities are damaged.
        """
        known = {key: value for key, value in self.result.items() if value is not None}
        if self.recipe.get("evaluate") != asked.evaluate.model_dump(mode="json"):
            return {key: value for key, value in known.items() if key not in ("perplexity", "zero_shot")}
        if known.get("perplexity", {}).keys() != set(texts):
            known.pop("perplexity", None)
        try:
            _FIGURES.validate_python(known.get("perplexity", {}))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, ("perplexity", *first["loc"])))
            raise InputError(f"{self.folder / RESULT}: {where}: {first['msg']}") from error
        return known


def plan_of(checkpoint: Path) -> PruningPlan:
    """Read the plan of a pruned checkpoint.

    Raises:
        ModelError: the folder is not one that flapkit wrote.
    """
    if not (checkpoint / MARK).is_file() or not (checkpoint / PLAN).is_file():
        raise ModelError(f"{checkpoint}: is no pruned checkpoint of flapkit's: it holds no {MARK} and {PLAN}")
    return PruningPlan.read(checkpoint / PLAN)


def read_mark(checkpoint: Path) -> dict[str, Any]:
    """Read what ``flapkit.json`` says.

    Raises:
        ModelError: it is damaged.
    """
    found = read_object(checkpoint / MARK, ModelError)
    try:
        _MARK.validate_python(found, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{checkpoint / MARK}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return found


def carried_by(checkpoint: Path, mark: Mapping[str, Any]) -> dict[str, Path]:
    """Find the files that a checkpoint says it has beside the model.

    Args:
        checkpoint: the folder.
        mark: what ``flapkit.json`` says.

    Raises:
        ModelError: a name leads out of the folder.
    """
    try:
        return {name: within(checkpoint, name) for name in mark.get("files", [])}
    except InputError as error:
        raise ModelError(f"{checkpoint / MARK}: files: {error}") from error
