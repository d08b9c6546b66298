"""What a run records for its report in ``report.json``, so that the report can be drawn without the model."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Kind, Site
from flapkit.pruning.site_errors import SiteError
from flapkit.system.errors import InputError
from flapkit.system.json_files import first_problem

BINS = 48
"""Bars of a histogram of scores."""

LINEAR_RANGE = 8.0
"""Largest score over smallest score above which the axis is logarithmic."""

Total = Annotated[int, Field(ge=0, lt=2**63)]
_FINITE = ConfigDict(allow_inf_nan=False)

PACKAGES = ("flapkit", "torch", "transformers", "lightning", "tokenizers", "safetensors", "numpy")
"""Packages whose versions are recorded."""


@dataclass(frozen=True, slots=True)
class ScoreRecord:
    """The distribution of the scores of a site's units; a unit's score is the mean over its channels.

    Args:
        kept: kept units in each bin.
        removed: removed units in each bin.
        threshold: the score between removed and kept units; None if no unit was removed, or none kept, or if the
            removed units are not those with the lowest scores.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FINITE

    kept: tuple[Total, ...]
    removed: tuple[Total, ...]
    threshold: float | None


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """One site before and after.

    Args:
        name: the site's name.
        layer: index of its layer.
        kind: ``attention``, ``mlp`` or ``mixture``.
        units: units of the dense model.
        kept: kept units.
        params_per_unit: parameters of a unit.
        heads: query heads of the dense model's attention site; 0 for an MLP, or if unknown.
        scores: the distribution of the scores; None if the searcher used none.
        error: the error of the consumer's output; None if it was not measured, or no unit was removed, or all.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FINITE

    name: str
    layer: Annotated[Total, Field(lt=10**6)]
    kind: Kind
    units: Annotated[Total, Field(gt=0)]
    kept: Total
    params_per_unit: Total
    heads: Total
    scores: ScoreRecord | None = None
    error: SiteError | None = None

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if more units are kept than there were."""
        if self.kept > self.units:
            raise ValueError(f"{self.name} keeps {self.kept} of {self.units} units")


@dataclass(frozen=True, slots=True)
class ScoreAxis:
    """The bins that the score histograms of one kind of site share.

    Args:
        scale: ``log`` or ``linear``.
        edges: edges of the bins, one more than bins; scores outside are counted in the first or last bin.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FINITE

    scale: Literal["log", "linear"]
    edges: Annotated[tuple[float, ...], Field(min_length=2)]

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if the edges are not ascending, or not positive on a logarithmic axis."""
        if list(self.edges) != sorted(set(self.edges)) or (self.scale == "log" and self.edges[0] <= 0):
            raise ValueError(
                f"the edges of a {self.scale} axis must be ascending{', from above 0' * (self.scale == 'log')}"
            )


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """A prompt, and its continuations by both models."""

    prompt: str
    dense: str
    pruned: str


@dataclass(frozen=True, slots=True)
class BudgetRecord:
    """The budget: the ratio, what it is a fraction of, and both as numbers of what is counted.

    Args:
        ratio: the fraction to remove.
        of: what of.
        base: all of it.
        params: how much of it is to be removed.
        asked: what was asked to be left, such as ``kv_cache: 0.5``; empty where the ratio was asked for.
    """

    ratio: Annotated[float, Field(ge=0, lt=1)]
    of: str
    base: Annotated[Total, Field(gt=0)]
    params: Total
    asked: str = ""


@dataclass(frozen=True, slots=True)
class ReportRecord:
    """What a report shows beside ``result.json``, ``recipe.yaml`` and ``flapkit.json``.

    Args:
        model: path of the dense model.
        budget: the budget.
        sites: every site, in the model's order.
        axes: kind of site -> the bins of its score histograms.
        error_tokens: held-out calibration tokens on which the errors were measured.
        samples: generated text.
        environment: package or machine -> version.
        written: time of writing, in UTC.
        format: version of this format.
    """

    model: str
    budget: BudgetRecord
    sites: Annotated[tuple[SiteRecord, ...], Field(min_length=1)]
    axes: Mapping[Kind, ScoreAxis]
    error_tokens: Total = 0
    samples: tuple[SampleRecord, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    written: str = ""
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a site's scores do not match the bins of its kind."""
        for site in self.sites:
            if site.scores is None:
                continue
            bins = len(self.axes[site.kind].edges) - 1 if site.kind in self.axes else 0
            if not len(site.scores.kept) == len(site.scores.removed) == bins:
                raise ValueError(f"the scores of {site.name} do not match the {bins} bins of {site.kind}")

    def to_json(self) -> str:
        """Write the record as JSON."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "report.json") -> ReportRecord:
        """Read a record; the inverse of ``to_json``.

        Raises:
            InputError: the text is not a record; the message starts with ``where``.
        """
        try:
            return _RECORD.validate_json(text)
        except ValidationError as error:
            raise InputError(f"{where}: {first_problem(error)}; run `flapkit run` again to rewrite it") from error


_RECORD = TypeAdapter(ReportRecord)


def make_record(
    model: str,
    sites: Sequence[Site],
    scores: Mapping[str, Tensor],
    plan: PruningPlan,
    budget: Budget,
    *,
    errors: Mapping[str, SiteError] | None = None,
    error_tokens: int = 0,
    samples: Sequence[SampleRecord] = (),
) -> ReportRecord:
    """Make the record of a run for its report.

    Args:
        model: path of the dense model.
        sites: its sites.
        scores: site name -> scores [units, k]; empty if the searcher used none.
        plan: the applied plan.
        budget: the budget.
        errors: site name -> the error of its consumer's output.
        error_tokens: tokens on which the errors were measured.
        samples: generated text.
    """
    values = {site.name: scores[site.name].double().cpu().mean(dim=1) for site in sites if site.name in scores}
    axes = {
        kind: _axis(torch.cat([values[site.name] for site in sites if site.kind == kind and site.name in values]))
        for kind in dict.fromkeys(site.kind for site in sites if site.name in values)
    }
    return ReportRecord(
        model=model,
        budget=BudgetRecord(budget.ratio, budget.of, budget.base, budget.amount, budget.asked),
        sites=tuple(
            SiteRecord(
                site.name,
                site.layer,
                site.kind,
                site.units,
                len(plan.keep[site.name]),
                site.params_per_unit,
                site.heads,
                _distribution(values[site.name], plan.keep[site.name], axes[site.kind])
                if site.name in values
                else None,
                (errors or {}).get(site.name),
            )
            for site in sites
        ),
        axes=axes,
        error_tokens=error_tokens,
        samples=tuple(samples),
        environment=environment(),
        written=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def environment() -> dict[str, str]:
    """Return the versions of Python and the packages, and the machine and device."""
    versions = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    versions["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return versions


def _axis(values: Tensor) -> ScoreAxis:
    """Choose bins for all scores of a kind, over the middle 99.8 %."""
    low, high = (float(q) for q in _quantiles(values, (0.001, 0.999)))
    positive = values[values > 0]
    if low >= 0 and len(positive) and high > LINEAR_RANGE * low:
        low = max(low, float(_quantiles(positive, (0.001,))[0]))
        edges = torch.logspace(math.log10(low), math.log10(high), BINS + 1, dtype=torch.float64)
        return ScoreAxis("log", tuple(edges.tolist()))
    if low == high:
        low, high = low - 0.5, high + 0.5
    return ScoreAxis("linear", tuple(torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()))


def _quantiles(values: Tensor, at: Sequence[float]) -> Tensor:
    # torch.quantile accepts at most 16 million values.
    ordered = values.sort().values
    return ordered[[round(q * (len(ordered) - 1)) for q in at]]


def _distribution(values: Tensor, keep: Sequence[int], axis: ScoreAxis) -> ScoreRecord:
    inner = torch.tensor(axis.edges[1:-1], dtype=torch.float64)
    bins = torch.bucketize(values, inner)
    is_kept = torch.zeros(len(values), dtype=torch.bool)
    is_kept[list(keep)] = True
    kept, removed = (torch.bincount(bins[which], minlength=BINS).tolist() for which in (is_kept, ~is_kept))
    return ScoreRecord(tuple(kept), tuple(removed), _threshold(values[is_kept], values[~is_kept], axis))


def _threshold(kept: Tensor, removed: Tensor, axis: ScoreAxis) -> float | None:
    if not len(removed) or not len(kept) or removed.max() > kept.min():
        return None
    below, above = float(removed.max()), float(kept.min())
    return (below * above) ** 0.5 if axis.scale == "log" and below > 0 else (below + above) / 2
