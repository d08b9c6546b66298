"""``flapkit report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flapkit.cli.app import app
from flapkit.cli.output import print_


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Page to write; by default RUN/report.html, or comparison.html for several."
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the figures as image files.", file_okay=False)
    ] = None,
    form: Annotated[Literal["png", "svg"] | None, typer.Option(help="Format of the images; both if not given.")] = None,
) -> None:
    """Write the report of a run again, or a comparison of several runs, without loading a model."""
    from flapkit.run.report import write_report

    written = write_report(runs, output=output, figures=figures, forms=(form,) if form else ("png", "svg"))
    for path in written:
        print_(str(path))
