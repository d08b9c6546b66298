"""``flapkit sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flapkit.cli.app import app
from flapkit.cli.options import NoCache, Overrides, Verbose
from flapkit.cli.output import print_, set_logging
from flapkit.cli.progress import progress_listener
from flapkit.system.errors import RunError

if TYPE_CHECKING:
    from flapkit.run.sweep.load import Sweep
    from flapkit.run.sweep.results import Row
    from flapkit.run.sweep.table import Cell, Column, Kind


@app.command()
def sweep(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A YAML file, or a name from `flapkit list sweeps`.")],
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="KEY=VALUE", help="Run only the points with this value, such as method=FLAP; repeatable."
        ),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the results.")] = None,
    no_cache: NoCache = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe with many settings, calibrated once. Run the command again to resume an interrupted sweep."""
    from flapkit.recipe.files import find_sweep
    from flapkit.run.sweep.load import label, load_sweep, select
    from flapkit.system.progress import Progress

    loaded = select(load_sweep(find_sweep(sweep), overrides or []), only or [])
    # A mistake in the sweep is reported before the rest is imported.
    from flapkit.run.sweep.run import run_sweep
    from flapkit.system.paths import cache_folder

    set_logging(quiet=quiet, verbose=verbose)
    folder = Path(output or loaded.file.output).expanduser()
    cache = None if no_cache else cache_folder()
    rows = run_sweep(loaded, folder, progress=Progress(progress_listener(quiet=quiet)), cache=cache)
    if not quiet:
        _print(loaded, rows, folder)
    failed = [f"{label(row.settings, row.method)}: {row.error}" for row in rows if row.error is not None]
    if failed:
        raise RunError("\n".join([f"{len(failed)} of {len(rows)} points failed", *failed]))


def _print(loaded: Sweep, rows: list[Row], folder: Path) -> None:
    from flapkit.run.sweep.table import table

    columns = [column for column in table(loaded.keys, rows) if column.name != "error" and any(column.cells)]
    # A standard error stands in the cell of its score.
    shown = [_cells(column, columns[index + 1 : index + 2]) for index, column in enumerate(columns)]
    headings = [column.title for column in columns if column.kind != "error"]
    printed = Table(*headings, title=f"{loaded.path} → {folder}")
    for row in zip(
        *(cells for column, cells in zip(columns, shown, strict=True) if column.kind != "error"), strict=True
    ):
        printed.add_row(*row)
    print_(printed)


def _cells(column: Column, after: list[Column]) -> list[str]:
    errors = after[0].cells if after and after[0].kind == "error" else [None] * len(column.cells)
    return [_cell(column.kind, value, error) for value, error in zip(column.cells, errors, strict=True)]


def _cell(kind: Kind, value: Cell, error: Cell) -> str:
    if isinstance(value, float):
        if kind != "share":
            return f"{value:.3f}"
        return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if isinstance(error, float) else "")
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
