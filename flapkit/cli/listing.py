"""``flapkit list``."""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flapkit.cli.app import app
from flapkit.cli.output import print_

if TYPE_CHECKING:
    from flapkit.registry import Registry


class Kind(StrEnum):
    """What ``flapkit list`` lists."""

    METRICS = "metrics"
    SEARCHERS = "searchers"
    COMPENSATORS = "compensators"
    ADAPTERS = "adapters"
    EXPORTERS = "exporters"
    DATASETS = "datasets"
    RECIPES = "recipes"
    SWEEPS = "sweeps"


@app.command("list")
def list_(kind: Annotated[Kind | None, typer.Argument(help="What to list; everything if not given.")] = None) -> None:
    """List the installed components, datasets, recipes and sweeps."""
    for listed in Kind if kind is None else [kind]:
        table = Table("name", "description", "from", title=listed.value)
        for row in _rows(listed):
            table.add_row(*row)
        print_(table)


def _rows(kind: Kind) -> list[tuple[str, str, str]]:
    if kind is Kind.DATASETS:
        from flapkit.text.named import DATASETS

        return [(name, dataset.description, "flapkit") for name, dataset in DATASETS.items()]
    if kind in (Kind.RECIPES, Kind.SWEEPS):
        from flapkit.recipe.files import shipped_recipes, shipped_sweeps

        return [
            (name, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "), "flapkit")
            for name, path in (shipped_recipes() if kind is Kind.RECIPES else shipped_sweeps()).items()
        ]
    from flapkit.registry import KINDS

    registry = _registry()
    components = next(known for known in KINDS if known.hook == f"flapkit_{kind.value}")
    return [
        (name, (component.__doc__ or "").split("\n")[0], registry.origin(components, name))
        for name, component in registry.names(components).items()
    ]


@cache
def _registry() -> Registry:
    from flapkit.registry import Registry

    return Registry.load()
