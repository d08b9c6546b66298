"""The content of a report, from a run's files: figures as plain data, and numbers as text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from flapkit.model.site import Kind
from flapkit.recipe.nodes import Position, parse
from flapkit.run.ledger import label_of, show
from flapkit.run.report.document import RunDocument
from flapkit.run.report.report_record import ReportRecord, SiteRecord

KINDS: Mapping[Kind, str] = {"attention": "Attention", "mlp": "MLP", "mixture": "Mixture of experts"}
HEADS, KV_GROUPS, CHANNELS = "heads", "KV heads with their query heads", "intermediate channels"
UNITS: Mapping[Kind, str] = {"mlp": CHANNELS, "mixture": "whole experts"}
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Tile:
    """A number at the top of the page.

    Args:
        label: its name.
        value: the number.
        before: the number of the dense model, if there is one.
        note: an explanation.
        share: the remaining share of the dense model, 0 to 1, drawn as a bar; None for no bar.
    """

    label: str
    value: str
    before: str = ""
    note: str = ""
    share: float | None = None


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """Parameters of one layer, or of the whole model, before and after."""

    label: str
    cells: tuple[int | None, ...]
    left: float | None = None
    total: bool = False


@dataclass(frozen=True, slots=True)
class SearchCurve:
    """The course of a search by trials or by training.

    Args:
        at: what is counted: ``trial`` or ``step``.
        measure: what falls, with its unit.
        line: name of the series that chooses: the best so far, or the validation.
        dots: name of the other series.
        rows: of both, with ``series``, ``at`` and ``value``, by ``at``.
        chosen: the trial or step whose plan was chosen; None if unknown.
        stairs: whether the line holds its value from one row to the next.
        logarithmic: whether the values are so far apart that their axis is logarithmic.
    """

    at: str
    measure: str
    line: str
    dots: str
    rows: Rows
    chosen: int | None
    stairs: bool
    logarithmic: bool

    @property
    def table(self) -> list[tuple[int, float | None, float | None]]:
        """The values by trial or step: of the line, then of the other series."""
        places = dict.fromkeys(row["at"] for row in self.rows)
        values = {(row["at"], row["series"]): row["value"] for row in self.rows}
        return [(at, values.get((at, self.line)), values.get((at, self.dots))) for at in places]


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and two continuations: their common start, and what follows in each."""

    prompt: str
    same: str
    dense: str
    pruned: str


def kinds(records: Iterable[ReportRecord]) -> dict[Kind, str]:
    """Name the kinds of sites that occur."""
    present = {site.kind for record in records for site in record.sites}
    return {kind: name for kind, name in KINDS.items() if kind in present}


def units(record: ReportRecord) -> dict[Kind, str]:
    """Name the unit of each kind of site: heads, KV heads with their query heads, channels, or experts."""
    by_kind: dict[Kind, str] = {}
    for site in record.sites:
        single_heads = site.kind == "attention" and site.heads in (0, site.units)
        by_kind.setdefault(site.kind, UNITS.get(site.kind) or (HEADS if single_heads else KV_GROUPS))
    return {kind: by_kind[kind] for kind in KINDS if kind in by_kind}


def structure(record: ReportRecord) -> Rows:
    """List the kept units, one row for each layer and kind; the experts of a layer are added up."""
    rows = []
    for (layer, kind), sites in _by_layer(record.sites).items():
        units, kept = sum(site.units for site in sites), sum(site.kept for site in sites)
        rows.append({"layer": layer, "kind": kind, "units": units, "kept": kept, "share": 100 * kept / units})
    return rows


def scores(record: ReportRecord) -> dict[Kind, dict[str, Any]]:
    """List the bars of the score histograms, by kind: ``scale``, ``edges``, ``bars`` and ``thresholds``."""
    figures: dict[Kind, dict[str, Any]] = {
        kind: {"scale": axis.scale, "edges": axis.edges, "bars": [], "thresholds": []}
        for kind, axis in record.axes.items()
    }
    for (layer, kind), sites in _by_layer(record.sites).items():
        records = [site.scores for site in sites if site.scores is not None]
        if not records:
            continue
        kept, removed = (
            [sum(counts) for counts in zip(*histograms, strict=True)]
            for histograms in ([scores.kept for scores in records], [scores.removed for scores in records])
        )
        most = max(k + r for k, r in zip(kept, removed, strict=True))
        figures[kind]["bars"] += [
            {"layer": layer, "bin": index, "kept": k, "removed": r, "most": most}
            for index, (k, r) in enumerate(zip(kept, removed, strict=True))
            if k or r
        ]
        # Every expert has its own threshold.
        if len(records) == 1 and records[0].threshold is not None:
            figures[kind]["thresholds"].append({"layer": layer, "value": records[0].threshold})
    return figures


def errors(record: ReportRecord) -> Rows:
    """List the errors of the pruned sites, in per cent."""
    return [
        {"layer": site.layer, "kind": site.kind, "site": site.name}
        | {
            name: None if value is None else 100 * value
            for name in ("predicted", "alone", "in_model")
            for value in [getattr(site.error, name)]
        }
        for site in record.sites
        if site.error is not None
    ]


def zero_shot(result: Mapping[str, Any]) -> Rows:
    """List the zero-shot scores: of each task the metric that papers report."""
    rows = []
    for task, scores in (result.get("zero_shot") or {}).items():
        metrics = scores.get("metrics", {}) if isinstance(scores, Mapping) else {}
        name = next((metric for metric in ("acc_norm", "acc", *metrics) if metric in metrics), None)
        if name is None:
            continue
        dense, pruned, paired = (metrics[name].get(part) or {} for part in ("dense", "pruned", "paired"))
        rows.append(
            {
                "task": task,
                "metric": name,
                "items": scores.get("items"),
                "dense": _percent(dense.get("value")),
                "pruned": _percent(pruned.get("value")),
                "dense_error": _percent(dense.get("stderr")),
                "pruned_error": _percent(pruned.get("stderr")),
                "p": paired.get("p_value"),
            }
        )
    return [row for row in rows if row["dense"] is not None and row["pruned"] is not None]


def _percent(value: Any) -> float | None:
    return 100 * value if isinstance(value, (int, float)) else None


def search(result: Mapping[str, Any]) -> SearchCurve | None:
    """Return the course of the search; None for a searcher that neither trains nor tries plans."""
    course = result.get("search") or {}
    if "values" in course:
        tried = _series("trial", course["values"])
        lowest = itertools.accumulate((row["value"] for row in tried), min)
        best = [{**row, "series": "best so far", "value": low} for row, low in zip(tried, lowest, strict=True)]
        measure = "perplexity" if course.get("objective") == "perplexity" else "divergence, nats per token"
        rows, names = [*best, *tried], ("trial", measure, "best so far", "trial")
        chosen = course.get("best_trial")
    else:
        rows = _series("validation", course.get("validation_loss", {}))
        rows += _series("training", course.get("training_loss", {}))
        names, chosen = ("step", "loss, nats per token", "validation", "training"), course.get("best_step")
    if not rows:
        return None
    values, ordered = [row["value"] for row in rows], sorted(rows, key=lambda row: int(row["at"]))
    logarithmic = 0 < 8 * min(values) < max(values)
    return SearchCurve(*names, ordered, chosen, stairs="values" in course, logarithmic=logarithmic)


def _series(name: str, values: Mapping[str, float | None]) -> Rows:
    return [{"series": name, "at": int(at), "value": value} for at, value in values.items() if value is not None]


def perplexities(result: Mapping[str, Any]) -> Rows:
    """List the perplexities by text: dense, pruned, recovered if there is one, and ``after``, the last of them."""
    rows: Rows = []
    for text, values in (result.get("perplexity") or {}).items():
        dense, pruned, recovered = (values.get(which) for which in ("dense", "pruned", "recovered"))
        if not dense or pruned is None:
            continue
        bits = values.get("bits_per_byte") or {}
        after = pruned if recovered is None else recovered
        figures = ("dense", "pruned", "recovered", "bits_per_byte")
        notes = {key: value for key, value in values.items() if key not in figures}
        rows.append(
            {"text": short(text), "dense": dense, "pruned": pruned, "recovered": recovered, "after": after}
            | {"change": after / dense - 1}
            | {"dense_bits": bits.get("dense"), "pruned_bits": bits.get("pruned"), "notes": notes}
        )
    return rows


def tradeoff(name: str, run: RunDocument) -> Rows:
    """List perplexity and parameters of the dense and the pruned model of a run, by text."""
    params = run.result["params"]
    return [
        {"run": name, "model": short(run.record.model), "text": row["text"], "which": which}
        | {"params": params[which], "perplexity": row["dense" if which == "dense" else "after"]}
        for row in perplexities(run.result)
        for which in ("dense", "pruned")
    ]


def ledger(document: RunDocument) -> list[LedgerRow]:
    """Count parameters before and after: attention, MLP and both of each layer, then the whole model.

    The cells are attention before and after, MLP before and after, and the removed parameters; all sums are exact. The
    experts of a mixture are MLPs.
    """
    rows, totals = [], dict.fromkeys((*KINDS, *(f"{kind} left" for kind in KINDS)), 0)
    layers: dict[int, dict[str, int]] = {}
    for site in document.record.sites:
        counts = layers.setdefault(site.layer, dict.fromkeys(totals, 0))
        for key, units in ((site.kind, site.units), (f"{site.kind} left", site.kept)):
            counts[key] += units * site.params_per_unit
            totals[key] += units * site.params_per_unit
    for layer, counts in layers.items():
        rows.append(_counted(f"layer {layer}", counts))
    return [*rows, _counted("all layers", totals, total=True)]


def _counted(label: str, counts: Mapping[str, int], *, total: bool = False) -> LedgerRow:
    before, after = (sum(counts[f"{kind}{suffix}"] for kind in KINDS) for suffix in ("", " left"))
    mlp, mlp_left = (counts[f"mlp{suffix}"] + counts[f"mixture{suffix}"] for suffix in ("", " left"))
    cells = (counts["attention"], counts["attention left"], mlp, mlp_left, before - after)
    return LedgerRow(label, cells, after / before if before else None, total)


def whole(document: RunDocument) -> list[tuple[str, int, int]]:
    """Count the parameters of the whole model: part, before, after."""
    params = document.result["params"]
    blocks = sum(site.units * site.params_per_unit for site in document.record.sites)
    left = sum(site.kept * site.params_per_unit for site in document.record.sites)
    rest = params["dense"] - blocks
    rows = [("prunable: attention and MLP", blocks, left), ("other: embeddings, norms, head", rest, rest)]
    if added := params["pruned"] - left - rest:
        rows.append(("biases added by the compensator", 0, added))
    return [*rows, ("whole model", params["dense"], params["pruned"])]


def costs(document: RunDocument) -> list[tuple[str, str, str, str, str]]:
    """List what the model costs in every measure: label, dense, pruned, change, and the most that was asked for."""
    return [
        (
            label_of(row["measure"], row["detail"]),
            show(row["measure"], row["dense"]),
            show(row["measure"], row["pruned"]),
            change(row["pruned"] / row["dense"] - 1),
            "" if row["asked"] is None else show(row["measure"], row["asked"]),
        )
        for row in document.result.get("costs", ())
    ]


def budget_of(document: RunDocument) -> str:
    """Write what was asked for: ``20 % of blocks``, or ``kv_cache: 0.5``."""
    budget = document.record.budget
    return budget.asked or f"{percent(budget.ratio)} of {budget.of}"


def samples(record: ReportRecord) -> list[Sample]:
    """Split each pair of continuations where they differ first."""
    split = []
    for sample in record.samples:
        same = _common(sample.dense, sample.pruned)
        split.append(Sample(sample.prompt, same, sample.dense[len(same) :], sample.pruned[len(same) :]))
    return split


def _common(first: str, second: str) -> str:
    pairs = zip(first, second, strict=False)
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def method(made: Mapping[str, Any]) -> str:
    """Name the components, without their options."""
    specs = [made[kind] for kind in ("metric", "searcher", "compensator")]
    several = [spec for entry in specs for spec in (entry if isinstance(entry, Sequence) else [entry])]
    return " + ".join(str(spec["name"]) for spec in several)


def hashes(made: Mapping[str, Any], result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List all hashes that the run recorded, by their keys."""
    return list(dict([*_hashes("", made), *_hashes("", result)]).items())


def _hashes(where: str, value: Any) -> Iterable[tuple[str, str]]:
    if not isinstance(value, Mapping):
        return
    for key, entry in value.items():
        if isinstance(entry, str) and key.endswith("sha256"):
            yield f"{where}{key.removesuffix('_sha256')}", entry
        yield from _hashes(f"{where}{key}: ", entry)


def differences(recipes: Sequence[str]) -> list[tuple[str, list[str]]]:
    """List the keys in which recipes differ, with the value of every recipe; `output` is left out."""
    flat = [dict(_flat("", _plain(recipe))) for recipe in recipes]
    keys = dict.fromkeys(key for settings in flat for key in settings if key != "output")
    values = [(key, [settings.get(key, "not set") for settings in flat]) for key in keys]
    return [(key, row) for key, row in values if len(set(row)) > 1]


def _plain(recipe: str) -> Any:
    root, _ = parse(recipe, lambda line, column: Position("recipe", line, column))
    return root.plain() if root else None


def _flat(where: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(f"{where}.{key}" if where else str(key), entry)
    elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        for index, entry in enumerate(value):
            yield from _flat(f"{where}.{index}", entry)
    else:
        yield where, "not set" if value is None else str(value)


def short(name: str) -> str:
    """Shorten a path to its last part; a hub id stays as it is."""
    first, comma, rest = name.partition(",")
    path = PurePath(first)
    return (path.name if path.is_absolute() or path.parts[:1] == ("..",) else first) + comma + rest


def count(value: float) -> str:
    """Write a large number in four digits: 3.050 M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.{max(0, 3 - len(str(int(abs(scaled)))))}f} {letter}"
    return f"{value:g}"


def figure(value: float) -> str:
    """Write a number with about four digits."""
    if value != value or abs(value) == float("inf"):
        return "∞" if value > 0 else "not finite"
    if abs(value) >= 1e5:
        return f"{value:.3g}"
    return f"{value:,.{max(0, 3 - len(str(int(abs(value)))))}f}"


def percent(ratio: float) -> str:
    """Write a ratio in per cent."""
    return f"{100 * ratio:.1f} %"


def change(ratio: float) -> str:
    """Write a change in per cent; above threefold as a factor."""
    return f"{TIMES} {figure(1 + ratio)}" if ratio > 2 else f"{signed(100 * ratio)} %"


def signed(value: float) -> str:
    """Write a difference with its sign, with a typographic minus."""
    return f"{value:+.1f}".replace("-", MINUS)


def _by_layer(sites: Iterable[SiteRecord]) -> dict[tuple[int, Kind], list[SiteRecord]]:
    groups: dict[tuple[int, Kind], list[SiteRecord]] = {}
    for site in sites:
        groups.setdefault((site.layer, site.kind), []).append(site)
    return groups
