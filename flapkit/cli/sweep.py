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


@app.command()
def sweep(
    sweep: Annotated[str, typer.Argument(metavar="SWEEP", help="A YAML file, or a name of `list sweeps`.")],
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder of the results.")] = None,
    no_cache: NoCache = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe with many settings, calibrated once; an interrupted sweep resumes."""
    from flapkit.recipe.files import find_sweep
    from flapkit.run.sweep.load import label, load_sweep
    from flapkit.system.progress import Progress
    from flapkit.system.workdir import open_workdir

    loaded = load_sweep(find_sweep(sweep), overrides or [])
    # A mistake in the sweep is reported before the rest is imported.
    from flapkit.run.sweep.results import Results
    from flapkit.run.sweep.run import run_sweep
    from flapkit.system.paths import cache_folder

    set_logging(quiet=quiet, verbose=verbose)
    folder = Path(output or loaded.file.output).expanduser()
    progress = Progress(progress_listener(quiet=quiet))
    cache = None if no_cache else cache_folder()
    with open_workdir(folder, {"sweep": str(folder.resolve())}, resume=True) as work:
        rows = run_sweep(loaded, Results(folder), progress=progress, cache=cache)
        _write(loaded, rows, folder)
        work.finish()
    if not quiet:
        _print(loaded, rows, folder)
    failed = [f"{label(row.settings)}: {row.error}" for row in rows if row.error is not None]
    if failed:
        raise RunError("\n".join([f"{len(failed)} of {len(rows)} points failed", *failed]))


def _write(loaded: Sweep, rows: list[Row], folder: Path) -> None:
    from flapkit.run.sweep.plot import draw
    from flapkit.run.sweep.table import to_csv
    from flapkit.system.workdir import write_file

    write_file(folder / "table.csv", to_csv(loaded.keys, rows))
    for kind in ("png", "svg"):
        write_file(folder / f"plot.{kind}", draw(rows, loaded.keys, loaded.file.plot, kind))


def _print(loaded: Sweep, rows: list[Row], folder: Path) -> None:
    from flapkit.run.sweep.table import table

    names, cells = table(loaded.keys, rows)
    shown = [index for index, name in enumerate(names) if name != "error" and any(row[index] for row in cells)]
    printed = Table(*(names[index] for index in shown), title=f"{loaded.path} → {folder}")
    for row in cells:
        printed.add_row(*(_cell(names[index], row[index]) for index in shown))
    print_(printed)


def _cell(name: str, value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1%}" if name == "removed of blocks" else f"{value:.3f}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
