"""The rows of a sweep as a plot: perplexity and accuracy against parameters or a number, a line for each method."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from flapkit.evaluation.zero_shot import MEAN
from flapkit.run.sweep.load import show
from flapkit.run.sweep.results import Row
from flapkit.run.sweep.schema import DENSE, PARAMETERS, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = "osD^vP"
LARGEST = 1e30
"""Perplexities above this, infinite ones included, are drawn here: matplotlib fails at the largest floats."""

DASHES = ("-", "--", ":", "-.")


@dataclass(slots=True)
class Line:
    """The rows of one method: x -> measured values."""

    values: dict[float, list[float]] = field(default_factory=dict)

    def add(self, x: float, y: float) -> None:
        """Add a row."""
        self.values.setdefault(x, []).append(y)


@dataclass(frozen=True, slots=True)
class Panel:
    """One measurement of the models.

    Args:
        title: what was measured.
        label: of the y axis.
        value: a row's value for one of its models, by the model's name; None if it was not measured.
        ratios: the values are compared by ratios, so that the axis may be logarithmic.
    """

    title: str
    label: str
    value: Callable[[Row, str], float | None]
    ratios: bool

    @classmethod
    def of_text(cls, text: str) -> Panel:
        """Show the perplexity of a text."""

        def value(row: Row, model: str) -> float | None:
            measured = row.perplexity.get(text, {}).get(model)
            return None if measured is None else min(max(measured, 1 / LARGEST), LARGEST)

        return cls(text, "perplexity", value, ratios=True)

    @classmethod
    def of_tasks(cls) -> Panel:
        """Show the mean of the zero-shot tasks."""

        def value(row: Row, model: str) -> float | None:
            measured = row.scores[MEAN][model]["value"] if MEAN in row.scores else math.nan
            return 100 * measured if math.isfinite(measured) else None

        return cls("zero-shot tasks", "mean accuracy, %", value, ratios=False)


def panels_of(rows: Sequence[Row]) -> list[Panel]:
    """List a panel for each evaluation text, and one for the zero-shot tasks."""
    texts = dict.fromkeys(name for row in rows for name in row.perplexity)
    return [*map(Panel.of_text, texts), *([Panel.of_tasks()] if any(MEAN in row.scores for row in rows) else [])]


def lines(rows: Sequence[Row], keys: Sequence[str], plot: Plot, panel: Panel) -> dict[str, Line]:
    """Group rows into lines: rows of one method differ only in the x axis and in the keys that are averaged over.

    Args:
        rows: the results of the points; failed ones are left out.
        keys: the swept keys.
        plot: what is plotted.
        panel: what was measured.

    Returns:
        Method -> its line.
    """
    moving = {plot.x, *plot.over} if plot.x != PARAMETERS else {"budget.ratio", "budget.of", *plot.over}
    by_method: dict[str, Line] = {}
    for row in rows:
        y = panel.value(row, row.stage)
        if row.error is not None or y is None:
            continue
        x: Any = row.params["pruned"] if plot.x == PARAMETERS else row.settings.get(plot.x)
        if isinstance(x, (int, float)):
            named = [row.method] if row.method is not None else []
            named += [_label(key, row) for key in keys if key in row.settings and key not in moving]
            by_method.setdefault(", ".join(named) or "all", Line()).add(x, y)
    return by_method


def _label(key: str, row: Row) -> str:
    section, _, name = key.rpartition(".")
    return f"{name} {show(row.settings[key])}" if section else show(row.settings[key])


def draw(rows: Sequence[Row], keys: Sequence[str], plot: Plot, kind: Literal["png", "svg"]) -> bytes:
    """Draw one panel for each evaluation text and one for the zero-shot tasks, and return the image."""
    panels = panels_of(rows)
    # Names are drawn as they are: a dollar sign in a path does not start a formula.
    plain: Any = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "flapkit", "font.size": 9}
    with rc_context(plain):
        figure = Figure(figsize=(7 * max(len(panels), 1) + 2, 4.8), layout="constrained")
        grid = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, rows, lines(rows, keys, plot, panel), plot, panel)
        if panels:
            handles, labels = _from_the_top(grid[0])
            columns = 1 + (len(labels) - 1) // 24
            figure.legend(handles, labels, loc="outside right upper", frameon=False, ncols=columns)
        image = io.BytesIO()
        figure.savefig(image, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    return image.getvalue()


def _from_the_top(axes: Axes) -> tuple[list[Any], list[str]]:
    """List the lines of a panel for the legend, from the top to the bottom of its left side."""

    def height(line: tuple[Any, str]) -> float:
        return float(line[0].get_ydata()[0])

    drawn = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=height, reverse=True)
    return [handle for handle, _ in drawn], [label for _, label in drawn]


def _draw_panel(axes: Axes, rows: Sequence[Row], by_method: dict[str, Line], plot: Plot, panel: Panel) -> None:
    styles = itertools.product(DASHES, colormaps["tab10"].colors)  # type: ignore[attr-defined]
    for (label, line), (dash, color), mark in zip(by_method.items(), styles, itertools.cycle(MARKS), strict=False):
        xs = sorted(line.values)
        means = [sum(line.values[x]) / len(line.values[x]) for x in xs]
        axes.plot(xs, means, color=color, linestyle=dash, marker=mark, markersize=4, linewidth=1.3, label=label)
        if any(len(values) > 1 for values in line.values.values()):
            lowest, highest = ([of(line.values[x]) for x in xs] for of in (min, max))
            axes.fill_between(xs, lowest, highest, color=color, alpha=0.15, linewidth=0)
    _frame(axes, rows, by_method, plot, panel)


def _frame(axes: Axes, rows: Sequence[Row], by_method: dict[str, Line], plot: Plot, panel: Panel) -> None:
    axes.set(xlabel=plot.x, ylabel=panel.label, title=panel.title)
    values = [y for line in by_method.values() for ys in line.values.values() for y in ys]
    dense = next((value for row in rows if (value := panel.value(row, DENSE)) is not None), None)
    if dense is not None:
        axes.axhline(dense, color="0.6", linewidth=1, linestyle=(0, (1, 2)))
        # Where points are far from the dense model: at few parameters, or at a high ratio.
        side, align = (0.01, "left") if plot.x == PARAMETERS else (1, "right")
        axes.annotate("dense", (side, dense), xycoords=("axes fraction", "data"), ha=align, va="bottom", color="0.4")
    if panel.ratios and values and max(values) > 4 * min(values if dense is None else [dense, *values]):
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
