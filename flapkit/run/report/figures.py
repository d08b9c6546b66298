"""The figures of a report as image files, for papers and slides: the data of the page, drawn by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullLocator

from flapkit.model.site import Kind
from flapkit.run.report import view
from flapkit.run.report.document import RunDocument, name_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Form = Literal["png", "svg"]

# The page's colours on a light background.
KEPT, REMOVED, REMOVED_BAR, DENSE, ACCENT, INK = "#2b6cb0", "#d9dee5", "#a9b3c0", "#77838f", "#c8551b", "#191d23"
RUNS = (KEPT, ACCENT, "#2f8559", "#8b4fb8", "#a8780a", "#b83280", "#0f8b9d", "#566070")
TALLEST = 0.85
"""Height of a row's tallest bar, as a fraction of the row."""


def draw_figures(runs: Sequence[RunDocument], forms: Sequence[Form]) -> dict[str, bytes]:
    """Draw the figures of one run's report, or of a comparison.

    Args:
        runs: one or more.
        forms: ``png``, ``svg`` or both.

    Returns:
        File name -> content; figures without data are left out.
    """
    if not forms:
        return {}
    with _plain_text():
        drawn = _figures_of(runs[0]) if len(runs) == 1 else _figures_of_all(runs)
        return {f"{name}.{form}": _write(figure, form) for name, figure in drawn.items() for form in forms}


def draw_structure(run: RunDocument) -> bytes:
    """Draw the share of units kept in each layer, as PNG."""
    with _plain_text():
        return _write(_structure(run), "png")


def _plain_text() -> AbstractContextManager[None]:
    """Draw names as they are: a dollar sign in a path does not start a formula."""
    return matplotlib.rc_context({"text.parse_math": False})


def _figures_of(run: RunDocument) -> dict[str, Figure]:
    figures = {"structure": _structure(run), "scores": _scores(run)}
    if search := view.search(run.result):
        figures["search"] = _search(search)
    if errors := view.errors(run.record):
        figures["errors"] = _panels(errors, lambda axes, rows, kind: _draw_errors(axes, rows), "% of the output")
    if tasks := view.zero_shot(run.result):
        figures["zero-shot"] = _zero_shot({"pruned": tasks})
    return figures


def _figures_of_all(runs: Sequence[RunDocument]) -> dict[str, Figure]:
    names = name_runs(runs)
    named = dict(zip(names, runs, strict=True))
    figures = {
        "structure": _lines({name: view.structure(run.record) for name, run in named.items()}, "share", "% kept")
    }
    errors = {
        name: rows
        for name, run in named.items()
        if (rows := [row for row in view.errors(run.record) if row["in_model"] is not None])
    }
    if errors:
        figures["errors"] = _lines(errors, "in_model", "% error in the model")
    if tasks := {name: rows for name, run in named.items() if (rows := view.zero_shot(run.result))}:
        figures["zero-shot"] = _zero_shot(tasks)
    if points := [row for name, run in named.items() for row in view.tradeoff(name, run)]:
        figures["tradeoff"] = _tradeoff(points, names)
    return figures


def _structure(run: RunDocument) -> Figure:
    figure = _panels(view.structure(run.record), _draw_structure, "% kept", view.units(run.record))
    figure.suptitle(f"{view.short(run.record.model)}: {view.budget_of(run)} by {view.method(run.made)}")
    return figure


def _panels(
    rows: view.Rows,
    draw: Callable[[Axes, view.Rows, str], None],
    label: str,
    units: Mapping[Kind, str] | None = None,
) -> Figure:
    """Draw a panel for each kind of site, side by side."""
    kinds = [kind for kind in view.KINDS if any(row["kind"] == kind for row in rows)]
    layers = [row["layer"] for row in rows]
    figure = Figure(figsize=(4.5 * max(len(kinds), 1), 3.4), layout="constrained")
    for index, (axes, kind) in enumerate(zip(_row_of(figure, len(kinds), sharey=True), kinds, strict=True)):
        of_kind = [row for row in rows if row["kind"] == kind]
        draw(axes, of_kind, kind)
        axes.set(title=": ".join(filter(None, [view.KINDS[kind], (units or {}).get(kind)])), xlabel="layer")
        axes.set_ylabel(label if index == 0 else "")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_structure(axes: Axes, rows: view.Rows, kind: str) -> None:
    layers = [row["layer"] for row in rows]
    axes.bar(layers, [100.0] * len(layers), color=REMOVED)
    bars = axes.bar(layers, [row["share"] for row in rows], color=KEPT)
    axes.set_ylim(0, 100)
    if len(layers) <= 12:
        axes.bar_label(bars, [str(row["kept"]) for row in rows], label_type="center", color="white")


def _draw_errors(axes: Axes, rows: view.Rows) -> None:
    styles: Mapping[str, Any] = {
        "in_model": {"label": "measured in the model", "color": ACCENT, "marker": "D", "s": 26},
        "alone": {"label": "measured alone", "color": KEPT, "marker": "o", "s": 26},
        "predicted": {"label": "predicted", "facecolors": "none", "edgecolors": INK, "marker": "o", "s": 70},
    }
    for name, style in styles.items():
        known = [row for row in rows if row[name] is not None]
        axes.scatter([row["layer"] for row in known], [row[name] for row in known], **style)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize="small")


def _scores(run: RunDocument) -> Figure:
    by_kind = view.scores(run.record)
    layers = sorted({site.layer for site in run.record.sites})
    figure = Figure(figsize=(4.5 * len(by_kind), max(2.4, min(12.0, 0.36 * len(layers) + 1))), layout="constrained")
    for axes, (kind, scores) in zip(_row_of(figure, len(by_kind)), by_kind.items(), strict=True):
        edges = scores["edges"]
        for colour, boxes in _boxes(scores, layers).items():
            axes.add_collection(PolyCollection(boxes, facecolors=colour))
        for threshold in scores["thresholds"]:
            base = _base(layers, threshold["layer"])
            axes.vlines(min(max(threshold["value"], edges[0]), edges[-1]), base, base + TALLEST, color=ACCENT)
        axes.set(title=view.KINDS[kind], xlabel="score", ylabel="layer", xscale=scores["scale"])
        axes.set(xlim=(edges[0], edges[-1]), ylim=(-0.1, len(layers)))
        if scores["scale"] == "log":
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.set_yticks([row + TALLEST / 2 for row in range(len(layers))], [str(layer) for layer in reversed(layers)])
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _search(search: view.SearchCurve) -> Figure:
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    dots, line = (_points(search, name) for name in (search.dots, search.line))
    axes.scatter(list(dots), list(dots.values()), s=12, color=REMOVED_BAR, label=search.dots)
    style: Any = {"drawstyle": "steps-post"} if search.stairs else {"marker": "o", "markersize": 3.5}
    axes.plot(list(line), list(line.values()), color=KEPT, label=search.line, **style)
    chosen = {at: value for at, value in line.items() if at == search.chosen}
    axes.scatter(list(chosen), list(chosen.values()), s=40, marker="D", color=ACCENT, zorder=3, label="chosen")
    axes.set(xlabel=search.at, ylabel=search.measure, yscale="log" if search.logarithmic else "linear")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _points(search: view.SearchCurve, series: str) -> dict[int, float]:
    """Return the values of a series, by trial or step."""
    return {row["at"]: row["value"] for row in search.rows if row["series"] == series}


def _boxes(scores: Mapping[str, Any], layers: Sequence[int]) -> dict[str, list[list[tuple[float, float]]]]:
    """List the corners of every bar by colour: the removed units of a bin, and above them the kept ones."""
    boxes: dict[str, list[list[tuple[float, float]]]] = {REMOVED_BAR: [], KEPT: []}
    for bar in scores["bars"]:
        left, right = scores["edges"][bar["bin"] : bar["bin"] + 2]
        base = _base(layers, bar["layer"])
        middle, top = (base + TALLEST * count / bar["most"] for count in (bar["removed"], bar["removed"] + bar["kept"]))
        for colour, low, high in ((REMOVED_BAR, base, middle), (KEPT, middle, top)):
            boxes[colour].append([(left, low), (left, high), (right, high), (right, low)])
    return boxes


def _base(layers: Sequence[int], layer: int) -> int:
    """Return the height of a layer's row; the first layer is at the top."""
    return len(layers) - 1 - layers.index(layer)


def _lines(runs: Mapping[str, view.Rows], value: str, label: str) -> Figure:
    """Draw a line for each run, in one panel for each kind of site.

    A line joins neighbouring layers alone.
    """
    every = sorted({row["layer"] for rows in runs.values() for row in rows})

    def draw(axes: Axes, rows: view.Rows, kind: str) -> None:
        for index, (name, of_run) in enumerate(runs.items()):
            known = {row["layer"]: row[value] for row in of_run if row["kind"] == kind}
            layers = range(every[0], every[-1] + 1)
            wider = _wider(runs, index)
            style: Any = {"color": RUNS[index % len(RUNS)], "linewidth": 1.5 + wider, "markersize": 3.5 + wider}
            axes.plot(layers, [known.get(layer, math.nan) for layer in layers], marker="o", label=name, **style)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize="small")

    return _panels([row for rows in runs.values() for row in rows], draw, label)


def _wider(runs: Collection[str], index: int) -> float:
    """Return the additional width of a run's marks: earlier runs are seen where later ones coincide with them."""
    return min(2.0, 8 / len(runs)) * (len(runs) - 1 - index)


def _zero_shot(runs: Mapping[str, view.Rows]) -> Figure:
    """Draw accuracy with 95 % intervals: the dense model, then each run."""
    first = next(iter(runs.values()))
    series = {"dense": (first, "dense", DENSE)}
    series |= {name: (rows, "pruned", RUNS[i % len(RUNS)]) for i, (name, rows) in enumerate(runs.items())}
    tasks = [row["task"] for row in first]
    thickness = 0.8 / len(series)
    figure = Figure(figsize=(7, 1 + 0.34 * len(tasks) * len(series)), layout="constrained")
    axes = figure.subplots()
    for index, (name, (rows, side, colour)) in enumerate(series.items()):
        known = [row for row in rows if row["task"] in tasks]
        places = [tasks.index(row["task"]) + (index + 0.5) * thickness - 0.4 for row in known]
        intervals = [1.96 * (row[f"{side}_error"] or 0) for row in known]
        values, height = [row[side] for row in known], thickness * 0.9
        axes.barh(places, values, height, xerr=intervals, color=colour, capsize=2, label=name)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.invert_yaxis()
    axes.set_xlabel("% correct")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _tradeoff(points: view.Rows, names: Sequence[str]) -> Figure:
    texts = list(dict.fromkeys(row["text"] for row in points))
    figure = Figure(figsize=(5 * len(texts), 3.6), layout="constrained")
    for axes, text in zip(_row_of(figure, len(texts)), texts, strict=True):
        for row in points:
            if row["text"] != text:
                continue
            if row["which"] == "dense":
                axes.scatter(row["params"], row["perplexity"], facecolors="none", edgecolors=DENSE, s=60)
            else:
                index = names.index(row["run"])
                style: Any = {"color": RUNS[index % len(RUNS)], "s": (6 + 2 * _wider(names, index)) ** 2}
                axes.scatter(row["params"], row["perplexity"], label=row["run"], **style)
        axes.set(title=text, xlabel="parameters", ylabel="perplexity")
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _row_of(figure: Figure, panels: int, *, sharey: bool = False) -> list[Axes]:
    return list(figure.subplots(1, panels, squeeze=False, sharey=sharey)[0])


def _write(figure: Figure, form: Form) -> bytes:
    """Write a figure as bytes, the same for the same figure."""
    image = io.BytesIO()
    options: dict[str, Any] = {"metadata": {"Date": None}} if form == "svg" else {"dpi": 120}
    with matplotlib.rc_context({"svg.hashsalt": "flapkit", "svg.fonttype": "none"}):
        figure.savefig(image, format=form, **options)
    return image.getvalue()
