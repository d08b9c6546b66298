"""The report as a self-contained HTML page: of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flapkit.run.report import view
from flapkit.run.report.document import RunDocument, name_runs
from flapkit.run.report.view import Tile
from flapkit.system.progress import duration
from flapkit.system.sizes import counted

TALLEST_SCORES = 900
"""Largest height of the panels with score histograms, in pixels."""


def render_run(run: RunDocument) -> str:
    """Write the report of one run.

    Args:
        run: the files of the run.

    Returns:
        Self-contained HTML.
    """
    layers = len({site.layer for site in run.record.sites})
    search = view.search(run.result)
    figures: dict[str, Any] = {
        "structure": view.structure(run.record),
        "scores": view.scores(run.record),
        "search": asdict(search) if search else None,
        "errors": view.errors(run.record),
        "zero_shot": view.zero_shot(run.result),
    }
    return _render(
        "run.html",
        run=run,
        title=f"{view.short(run.record.model)}, {view.percent(_removed(run))} removed by {view.method(run.made)}",
        verdict=verdict(run),
        tiles=tiles(run),
        figures=figures,
        kinds=view.kinds([run.record]),
        units=view.units(run.record),
        heights={"scores": min(TALLEST_SCORES, max(170, 34 * layers + 50)), "zero_shot": _bars(figures["zero_shot"])},
        search=search,
        perplexities=view.perplexities(run.result),
        ledger=view.ledger(run),
        whole=view.whole(run),
        costs=view.costs(run),
        samples=view.samples(run.record),
        method=view.method(run.made),
        hashes=view.hashes(run.made, run.result),
        seconds=dict(run.result.get("seconds") or {}),
        next_steps=dict(run.result.get("next") or {}),
        warnings=list(dict.fromkeys(run.result.get("warnings", ()))),
    )


def render_comparison(runs: Sequence[RunDocument]) -> str:
    """Write a page that compares several runs.

    Args:
        runs: at least two.

    Returns:
        Self-contained HTML.
    """
    names = name_runs(runs)
    rows = [{"run": name, "document": run, **_summary(run)} for name, run in zip(names, runs, strict=True)]
    figures: dict[str, Any] = {
        "structure": _labelled(names, [view.structure(run.record) for run in runs]),
        "errors": _labelled(names, [view.errors(run.record) for run in runs]),
        "zero_shot": _labelled(names, [view.zero_shot(run.result) for run in runs]),
        "tradeoff": [row for name, run in zip(names, runs, strict=True) for row in view.tradeoff(name, run)],
        "runs": names,
    }
    texts = list(dict.fromkeys(row["text"] for row in figures["tradeoff"]))
    return _render(
        "comparison.html",
        title=f"{len(runs)} runs: {', '.join(names)}",
        verdict=_compare(rows, texts),
        rows=rows,
        texts=texts,
        best={text: _best(rows, text) for text in texts},
        differences=view.differences([run.recipe for run in runs]),
        figures=figures,
        kinds=view.kinds([run.record for run in runs]),
        units={kind: unit for run in reversed(runs) for kind, unit in view.units(run.record).items()},
        heights={"zero_shot": 60 + (24 + 18 * len(runs)) * len({row["task"] for row in figures["zero_shot"]})},
    )


def _compare(rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> str:
    """Write the range of ratios, and the run with the lowest perplexity on the first text."""
    ratios = [row["ratio"] for row in rows]
    span = f"{view.percent(min(ratios))} to {view.percent(max(ratios))}"
    summary = f"{span if max(ratios) - min(ratios) > 5e-4 else view.percent(ratios[0])} removed."
    for text in texts[:1]:
        best = _best(rows, text)
        row = next(row for row in rows if row["run"] == best)
        summary += (
            f" Lowest perplexity on {text.split(',')[0]}: {view.figure(row['perplexity'][text]['after'])}, by {best}."
        )
    return summary


def _best(rows: Sequence[Mapping[str, Any]], text: str) -> str:
    perplexities = {row["run"]: row["perplexity"][text]["after"] for row in rows if text in row["perplexity"]}
    return str(min(perplexities, key=perplexities.__getitem__))


def verdict(run: RunDocument) -> str:
    """Write the result of the run in one or two sentences."""
    budget = run.record.budget
    asked = budget.asked or view.percent(budget.ratio)
    base = {"blocks": "the block parameters", "model": "all parameters"}.get(budget.of, f"the {budget.of} parameters")
    sentence = f"{view.percent(_removed(run))} of {base} removed (budget {asked})."
    for row in view.perplexities(run.result)[:1]:
        rose = "rose" if row["change"] > 0 else "fell"
        sentence += (
            f" Perplexity on {row['text'].split(',')[0]} {rose} from {view.figure(row['dense'])} "
            f"to {view.figure(row['after'])}."
        )
    return sentence


def tiles(run: RunDocument) -> list[Tile]:
    """Collect the tiles at the top of the page."""
    params = run.result["params"]
    left, removed = params["pruned"] / params["dense"], params["removed"] / params["blocks"]
    collected = [
        Tile(
            "Parameters",
            view.count(params["pruned"]),
            view.count(params["dense"]),
            f"{view.change(left - 1)} of the whole model, {view.change(-removed)} of its blocks",
            left,
        )
    ]
    for row in view.perplexities(run.result)[:2]:
        note = view.change(row["change"])
        if row["recovered"] is not None:
            note += f"; {view.figure(row['pruned'])} before recovery"
        collected.append(Tile(f"Perplexity, {row['text']}", view.figure(row["after"]), view.figure(row["dense"]), note))
    if tasks := view.zero_shot(run.result):
        dense, pruned = (sum(row[which] for row in tasks) / len(tasks) for which in ("dense", "pruned"))
        note = f"mean of {counted(len(tasks), 'task')}, {view.signed(pruned - dense)} points"
        collected.append(Tile("Zero-shot", f"{pruned:.1f} %", f"{dense:.1f} %", note))
    collected += _speed(run.bench)
    seconds = run.result.get("seconds") or {}
    slowest = max(seconds, key=seconds.__getitem__, default="")
    note = f"longest: {slowest}, {duration(seconds[slowest])}" if slowest else ""
    return [*collected, Tile("Time", duration(_time(run)), note=note)]


def _speed(bench: Mapping[str, Any]) -> list[Tile]:
    """Show the speed relative to the dense model, if ``flapkit bench`` measured it."""
    ratios, expected = bench.get("ratios") or {}, bench.get("expected")
    note = f"dense is 1.00; {expected:.2f} expected from the parameters" if expected else "dense is 1.00"
    names = {"prefill": "Prefill speed", "decode": "Decode speed"}
    return [
        Tile(label, f"{view.TIMES} {ratios[name]:.2f}", note=note) for name, label in names.items() if name in ratios
    ]


def _time(run: RunDocument) -> float:
    """Return the seconds that the command took."""
    return float(run.result.get("total_seconds") or sum((run.result.get("seconds") or {}).values()))


def _removed(run: RunDocument) -> float:
    """Return the removed fraction of the parameters that the budget counts."""
    params, budget = run.result["params"], run.record.budget
    return float(params["removed"] / (params["blocks"] if budget.asked else budget.base))


def _summary(run: RunDocument) -> dict[str, Any]:
    tasks = view.zero_shot(run.result)
    return {
        "model": view.short(run.record.model),
        "method": view.method(run.made),
        "ratio": _removed(run),
        "budget": run.record.budget.ratio,
        "of": run.record.budget.of,
        "params": run.result["params"]["pruned"],
        "change": run.result["params"]["pruned"] / run.result["params"]["dense"] - 1,
        "perplexity": {row["text"]: row for row in view.perplexities(run.result)},
        "zero_shot": sum(row["pruned"] for row in tasks) / len(tasks) if tasks else None,
        "seconds": _time(run),
    }


def _labelled(names: Sequence[str], figures: Sequence[view.Rows]) -> view.Rows:
    return [{**row, "run": name} for name, rows in zip(names, figures, strict=True) for row in rows]


def _bars(rows: view.Rows) -> int:
    return 60 + 52 * len(rows)


def _code(text: str) -> Markup:
    """Mark up text between backticks as code."""
    parts = (
        Markup("<code>{}</code>" if index % 2 else "{}").format(part) for index, part in enumerate(text.split("`"))
    )
    return Markup("").join(parts)


def _render(template: str, **content: Any) -> str:
    return (
        _environment()
        .get_template(template)
        .render(
            **content,
            style=_source("templates", "style.css"),
            plot=_source("vendor", "plot.js"),
            charts=_source("templates", "charts.js"),
        )
    )


def _source(*path: str) -> str:
    return files("flapkit.run.report").joinpath(*path).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    """Make the environment of the templates, once: compiling them takes longer than rendering a page."""
    environment = Environment(
        loader=PackageLoader("flapkit.run.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "code": _code,
        "count": view.count,
        "counted": counted,
        "figure": view.figure,
        "change": view.change,
        "duration": duration,
        "short": view.short,
    }
    return environment
