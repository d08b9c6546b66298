"""Read and check the files of a pruned checkpoint beside the model, before any work starts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
from pydantic import ConfigDict
from typing_extensions import TypedDict

from flapkit.checkpoint.folder import LAYERS, MARK, PLAN, recipe_of
from flapkit.checkpoint.modeling_file import ENTRY
from flapkit.model.plan import PruningPlan
from flapkit.recipe.files import read_settings
from flapkit.recipe.schema import Recipe
from flapkit.run.report.document import RECORD, read_checked, read_made, read_record, read_result
from flapkit.run.report.report_record import ReportRecord
from flapkit.system.errors import InputError, ModelError
from flapkit.system.paths import within

RESULT = "result.json"


class _Model(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    path: str | None


class _Named(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    name: str


class _Mark(TypedDict, total=False):
    """The entries of ``flapkit.json`` that are read; it has others."""

    files: list[str]
    model: _Model
    metric: _Named | str | None
    searcher: _Named | str | None
    compensator: _Named | str | list[_Named | str] | None


class _Figures(TypedDict):
    """The figures of ``result.json`` that those of a recovered model are added to."""

    bits_per_byte: Mapping[str, float | None]
    batch_size: Mapping[str, int]


_MARK = pydantic.TypeAdapter(_Mark)
_FIGURES = pydantic.TypeAdapter(dict[str, _Figures])


@dataclass(frozen=True, slots=True)
class Origin:
    """A pruned checkpoint without its model.

    Args:
        folder: its folder.
        plan: the units kept.
        made: the components and options that made it, from ``flapkit.json``.
        carried: name -> path of every additional file listed in ``flapkit.json``; all are inside the folder.
        result: its measurements, from ``result.json``; empty if there are none.
        recipe: the settings of its recipe; empty if there is none.
        record: the data of its report; None if it has none.
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
        made = {key: value for key, value in mark.items() if key not in ("versions", "files", ENTRY, LAYERS)}
        result, recipe = folder / RESULT, recipe_of(folder)
        carried, record = carried_by(folder, mark), None
        if RECORD in carried:
            # The report will be rendered again.
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

    def known(self, settings: Recipe, texts: Collection[str]) -> dict[str, Any]:
        """Return the checkpoint's measurements, without perplexities and scores if a recipe measures others.

        Args:
            settings: the recipe.
            texts: the names of its evaluation texts.

        Raises:
            InputError: the perplexities are damaged.
        """
        known = {key: value for key, value in self.result.items() if value is not None}
        if self.recipe.get("evaluate") != settings.evaluate.model_dump(mode="json"):
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
        raise ModelError(f"{checkpoint} is not a pruned checkpoint of flapkit: it has no {MARK} or no {PLAN}")
    return PruningPlan.read(checkpoint / PLAN)


def read_mark(checkpoint: Path) -> dict[str, Any]:
    """Read ``flapkit.json``.

    Raises:
        ModelError: it is damaged.
    """
    return read_checked(checkpoint / MARK, _MARK, ModelError)


def carried_by(checkpoint: Path, mark: Mapping[str, Any]) -> dict[str, Path]:
    """Return the paths of a checkpoint's additional files.

    Args:
        checkpoint: the folder.
        mark: the content of ``flapkit.json``.

    Raises:
        ModelError: a name leads out of the folder.
    """
    try:
        return {name: within(checkpoint, name) for name in mark.get("files", [])}
    except InputError as error:
        raise ModelError(f"{checkpoint / MARK}: files: {error}") from error
