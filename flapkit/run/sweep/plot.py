"""The rows of a sweep as a plot: perplexity against parameters or a swept number, one line for each method."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from flapkit.run.sweep.load import show
from flapkit.run.sweep.results import Row
from flapkit.run.sweep.schema import PARAMETERS, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = "osD^vP"
LARGEST = 1e30
"""Perplexities above this, infinite ones included, are drawn here: matplotlib fails at the largest floats."""

DASHES = ("-", "--", ":", "-.")


@dataclass(slots=True)
class Line:
    """The rows of one method: x -> perplexities."""

    values: dict[float, list[float]] = field(default_factory=dict)

    def add(self, x: float, y: float) -> None:
        """Add a row."""
        self.values.setdefault(x, []).append(y)


def lines(rows: Sequence[Row], keys: Sequence[str], plot: Plot, text: str) -> dict[str, Line]:
    """Group rows into lines: rows of one method differ only in the x axis and in the keys that are averaged over.

    Args:
        rows: the results of the points; failed ones are left out.
        keys: the swept keys.
        plot: what is plotted.
        text: the name of the evaluation text.

    Returns:
        Method -> its line.
    """
    moving = {plot.x, *plot.over} if plot.x != PARAMETERS else {"budget.ratio", "budget.of", *plot.over}
    by_method: dict[str, Line] = {}
    for row in rows:
        if row.error is not None or text not in row.perplexity:
            continue
        x: Any = row.params["pruned"] if plot.x == PARAMETERS else row.settings.get(plot.x)
        if isinstance(x, (int, float)):
            method = ", ".join(_label(key, row) for key in keys if key in row.settings and key not in moving)
            by_method.setdefault(method or "all", Line()).add(x, _drawable(row.perplexity[text]["pruned"]))
    return by_method


def _drawable(perplexity: float) -> float:
    return min(max(perplexity, 1 / LARGEST), LARGEST)


def _label(key: str, row: Row) -> str:
    section, _, name = key.rpartition(".")
    return f"{name} {show(row.settings[key])}" if section else show(row.settings[key])


def draw(rows: Sequence[Row], keys: Sequence[str], plot: Plot, kind: Literal["png", "svg"]) -> bytes:
    """Draw one panel for each evaluation text, and return the image."""
    texts = list(dict.fromkeys(name for row in rows for name in row.perplexity))
    # Names are drawn as they are: a dollar sign in a path does not start a formula.
    plain: Any = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "flapkit", "font.size": 9}
    with rc_context(plain):
        figure = Figure(figsize=(7 * max(len(texts), 1) + 2, 4.8), layout="constrained")
        panels = figure.subplots(1, max(len(texts), 1), squeeze=False)[0]
        for axes, text in zip(panels, texts, strict=False):
            _panel(axes, rows, lines(rows, keys, plot, text), plot, text)
        if texts:
            handles, labels = panels[0].get_legend_handles_labels()
            columns = 1 + (len(labels) - 1) // 24
            figure.legend(handles, labels, loc="outside right upper", frameon=False, ncols=columns)
        image = io.BytesIO()
        figure.savefig(image, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    return image.getvalue()


def _panel(axes: Axes, rows: Sequence[Row], by_method: dict[str, Line], plot: Plot, text: str) -> None:
    styles = itertools.product(DASHES, colormaps["tab10"].colors)  # type: ignore[attr-defined]
    for (label, line), (dash, color), mark in zip(by_method.items(), styles, itertools.cycle(MARKS), strict=False):
        xs = sorted(line.values)
        means = [sum(line.values[x]) / len(line.values[x]) for x in xs]
        axes.plot(xs, means, color=color, linestyle=dash, marker=mark, markersize=4, linewidth=1.3, label=label)
        if any(len(values) > 1 for values in line.values.values()):
            lowest, highest = ([of(line.values[x]) for x in xs] for of in (min, max))
            axes.fill_between(xs, lowest, highest, color=color, alpha=0.15, linewidth=0)
    _frame(axes, rows, by_method, plot, text)


def _frame(axes: Axes, rows: Sequence[Row], by_method: dict[str, Line], plot: Plot, text: str) -> None:
    dense = _drawable(next(row.perplexity[text]["dense"] for row in rows if text in row.perplexity))
    axes.axhline(dense, color="0.6", linewidth=1, linestyle=(0, (1, 2)))
    # Where points are far from the dense model: at few parameters, or at a high ratio.
    side, align = (0.01, "left") if plot.x == PARAMETERS else (1, "right")
    axes.annotate("dense", (side, dense), xycoords=("axes fraction", "data"), ha=align, va="bottom", color="0.4")
    axes.set(xlabel=plot.x, ylabel="perplexity", title=text)
    values = [y for line in by_method.values() for ys in line.values.values() for y in ys]
    if values and max(values) > 4 * min([dense, *values]):
        axes.set_yscale("log")
        _label_decades(axes)
    xs = {x for line in by_method.values() for x in line.values}
    if plot.x == PARAMETERS:
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
    elif xs and min(xs) > 0 and max(xs) >= 16 * min(xs):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(xs), [f"{x:g}" for x in sorted(xs)])
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)


def _label_decades(axes: Axes) -> None:
    """Label a logarithmic y axis with numbers: matplotlib's own labels are formulas."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}" if y < 1e6 else f"{y:.0e}")
