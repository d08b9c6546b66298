"""The tutorial is a notebook: its cells run from top to bottom, and print what the page says."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import warnings

import jupytext
import matplotlib
from blocks import NOTEBOOK, ROOT


def test_runs_and_prints_what_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    scope, compared = {"__name__": "__main__"}, 0
    for cell, following in itertools.pairwise(jupytext.read(ROOT / NOTEBOOK).cells):
        if cell.cell_type != "code":
            continue
        # In this process, which has imported everything already: a kernel would take half a minute to start.
        with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
            warnings.simplefilter("default")
            exec(compile(cell.source, cell.source.partition("\n")[0], "exec"), scope)
        if said := re.match(r"```\n(.*?)\n```", following.source, flags=re.DOTALL):
            assert printed.getvalue().strip() == said[1]
            compared += 1
    assert compared == 5
    assert (tmp_path / "plan.png").stat().st_size > 5000
