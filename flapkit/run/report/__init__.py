"""The report of a run: what it notes, and the page and the figures that are drawn from that."""

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
    """Write the page of one run, or one that compares several, from what their folders hold.

    Args:
        runs: output folders of runs, each once.
        output: the page; by default ``report.html`` in the run's folder, or ``comparison.html`` here for several.
        figures: folder for the figures as pictures; None for none.
        forms: forms of the pictures.

    Returns:
        The files that were written.

    Raises:
        InputError: a folder that is no run's, or one that is named twice.
        OutputError: a file cannot be written.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError("report: a run is named twice")
    documents = [RunDocument.of_folder(run) for run in runs]
    single = len(documents) == 1
    page = output or (runs[0] / "report.html" if single else Path("comparison.html"))
    content = {page: (render_run(documents[0]) if single else render_comparison(documents)).encode()}
    if figures is not None:
        content |= {figures / name: picture for name, picture in draw_figures(documents, forms).items()}
    for path, written in content.items():
        with new_file(path, overwrite=True) as file:
            file.write_bytes(written)
    return list(content)
