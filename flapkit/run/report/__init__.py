"""The report of a run: an HTML page and figures, drawn from the files in the run's folder without the model.

`write_report` writes the page of one run, or one that compares several. A run records what its report needs in
`report.json`.

Modules:
    document: read the files of a run's folder
    figures: the figures as PNG and SVG, by matplotlib
    page: the HTML page, self-contained, by jinja2 and Observable Plot
    report_record: `report.json`, what a run records for its report
    view: the numbers of a report as plain data, from a run's files
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flapkit.checkpoint.folder import new_file
from flapkit.run.report.document import RunDocument
from flapkit.run.report.figures import Form, draw_figures
from flapkit.run.report.page import render_comparison, render_run
from flapkit.system.errors import InputError

__all__ = ["RunDocument", "draw_figures", "render_comparison", "render_run", "write_report"]


def write_report(
    runs: Sequence[Path],
    *,
    output: Path | None = None,
    figures: Path | None = None,
    forms: Sequence[Form] = ("png", "svg"),
) -> list[Path]:
    """Write the page of one run, or one that compares several, from the files in their folders.

    Args:
        runs: output folders of runs, all different.
        output: the page; by default ``report.html`` in the run's folder, or ``comparison.html`` in the current
            directory for several runs.
        figures: folder for the figures as image files; None for none.
        forms: formats of the image files.

    Returns:
        The written files.

    Raises:
        InputError: a folder is not the output of a run, or is given twice.
        OutputError: a file cannot be written.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError("report: the same run is given twice")
    documents = [RunDocument.of_folder(run) for run in runs]
    single = len(documents) == 1
    page = output or (runs[0] / "report.html" if single else Path("comparison.html"))
    content = {page: (render_run(documents[0]) if single else render_comparison(documents)).encode()}
    if figures is not None:
        content |= {figures / name: image for name, image in draw_figures(documents, forms).items()}
    for path, data in content.items():
        with new_file(path, overwrite=True) as file:
            file.write_bytes(data)
    return list(content)
