"""What a run's report is made of, as ``report.json`` keeps it: no model is needed to draw it again."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from flapkit.model.plan import Budget, PruningPlan
from flapkit.model.site import Kind, Site
from flapkit.pruning.site_errors import SiteError
from flapkit.system.errors import InputError

BINS = 48
"""Bars of a histogram of scores."""

WIDEST_LINEAR = 8.0
"""Scores whose largest is so many times their smallest are shown on a logarithmic axis."""

Total = Annotated[int, Field(ge=0, lt=2**63)]
_FINITE = ConfigDict(allow_inf_nan=False)

PACKAGES = ("flapkit", "torch", "transformers", "lightning", "tokenizers", "safetensors", "numpy")
"""Packages whose versions are noted."""


@dataclass(frozen=True, slots=True)
class ScoreRecord:
    """How the scores of a site's units are spread; a unit's score is the mean over its channels.

    Args:
        kept: units of each bin that are kept.
        removed: units of each bin that are gone.
        threshold: the score between the two, where the lowest scores of the site went; None where nothing went, or
            the searcher did not go by the score alone.
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
        kind: ``attention`` or ``mlp``.
        units: units of the dense model.
        kept: units that are kept.
        params_per_unit: parameters that go with a unit.
        heads: query heads of the dense model's attention site; 0 for an MLP, or where nobody says.
        scores: how the scores are spread; None where the searcher used none.
        error: how far the consumer's output moved; None where it was not measured, or no unit went.
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
        """Raise ``ValueError`` where more is kept than there was."""
        if self.kept > self.units:
            raise ValueError(f"{self.name} keeps {self.kept} of {self.units} units")


@dataclass(frozen=True, slots=True)
class ScoreAxis:
    """The bins that the score histograms of one kind of site share.

    Args:
        scale: ``log`` or ``linear``.
        edges: borders of the bins, one more than there are bins; scores outside are in the bins at the ends.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _FINITE

    scale: Literal["log", "linear"]
    edges: Annotated[tuple[float, ...], Field(min_length=2)]

    def __post_init__(self) -> None:
        """Raise ``ValueError`` where the edges do not ascend, or a logarithm has none."""
        if list(self.edges) != sorted(set(self.edges)) or (self.scale == "log" and self.edges[0] <= 0):
            raise ValueError(f"the edges of a {self.scale} axis have to ascend")


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """A prompt, and what both models made of it."""

    prompt: str
    dense: str
    pruned: str


@dataclass(frozen=True, slots=True)
class BudgetRecord:
    """What was asked for: the ratio, what it counts, and both as parameters."""

    ratio: Annotated[float, Field(ge=0, lt=1)]
    of: str
    base: Annotated[Total, Field(gt=0)]
    params: Total


@dataclass(frozen=True, slots=True)
class ReportRecord:
    """What a report shows beside what ``result.json``, ``recipe.yaml`` and ``flapkit.json`` say.

    Args:
        model: path of the dense model.
        budget: what was asked for.
        sites: every site, in the model's order.
        axes: kind of site -> the bins of its score histograms.
        error_tokens: held-out calibration tokens that the errors were measured on.
        samples: generated text.
        environment: package or machine -> version.
        written: when, in UTC.
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
        """Raise ``ValueError`` where a site's scores do not lie in the bins of its kind."""
        for site in self.sites:
            if site.scores is None:
                continue
            bins = len(self.axes[site.kind].edges) - 1 if site.kind in self.axes else 0
            if not len(site.scores.kept) == len(site.scores.removed) == bins:
                raise ValueError(f"the scores of {site.name} are not in the {bins} bins of {site.kind}")

    def to_json(self) -> str:
        """Write the record as JSON."""
        return json.dumps(asdict(self), separators=(",", ":"), allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "report.json") -> ReportRecord:
        """Read a record; the inverse of ``to_json``.

        Raises:
            InputError: the text is no record; ``where`` is named.
        """
        try:
            return _RECORD.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "its content"
            raise InputError(f"{where}: {place}: {first['msg']}; `flapkit run` writes it anew") from error


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
    """Note what a run's report is made of.

    Args:
        model: path of the dense model.
        sites: its sites.
        scores: site name -> scores [units, k]; empty where the searcher used none.
        plan: what was carried out.
        budget: what was asked for.
        errors: site name -> how far its consumer's output moved.
        error_tokens: what they were measured on.
        samples: generated text.
    """
    values = {site.name: scores[site.name].double().cpu().mean(dim=1) for site in sites if site.name in scores}
    axes = {
        kind: _axis(torch.cat([values[site.name] for site in sites if site.kind == kind and site.name in values]))
        for kind in dict.fromkeys(site.kind for site in sites if site.name in values)
    }
    return ReportRecord(
        model=model,
        budget=BudgetRecord(budget.ratio, budget.of, budget.base, budget.params),
        sites=tuple(
            SiteRecord(
                site.name,
                site.layer,
                site.kind,
                site.units,
                len(plan.keep[site.name]),
                site.params_per_unit,
                site.heads,
                _spread(values[site.name], plan.keep[site.name], axes[site.kind]) if site.name in values else None,
                (errors or {}).get(site.name),
            )
            for site in sites
        ),
        axes=axes,
        error_tokens=error_tokens,
        samples=tuple(samples),
        environment=environment(),
        written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def environment() -> dict[str, str]:
    """Name the versions of what computes, and the machine."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return found


def _axis(values: Tensor) -> ScoreAxis:
    """Choose bins for all scores of a kind: the middle 99.8 %, and whatever is beyond in the bins at the ends."""
    low, high = (float(q) for q in _quantiles(values, (0.001, 0.999)))
    positive = values[values > 0]
    if low >= 0 and len(positive) and high > WIDEST_LINEAR * low:
        low = max(low, float(_quantiles(positive, (0.001,))[0]))
        edges = torch.logspace(math.log10(low), math.log10(high), BINS + 1, dtype=torch.float64)
        return ScoreAxis("log", tuple(edges.tolist()))
    if low == high:
        low, high = low - 0.5, high + 0.5
    return ScoreAxis("linear", tuple(torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()))


def _quantiles(values: Tensor, at: Sequence[float]) -> Tensor:
    # torch.quantile takes 16 million values at most.
    ordered = values.sort().values
    return ordered[[round(q * (len(ordered) - 1)) for q in at]]


def _spread(values: Tensor, keep: Sequence[int], axis: ScoreAxis) -> ScoreRecord:
    inner = torch.tensor(axis.edges[1:-1], dtype=torch.float64)
    bins = torch.bucketize(values, inner)
    is_kept = torch.zeros(len(values), dtype=torch.bool)
    is_kept[list(keep)] = True
    kept, removed = (torch.bincount(bins[which], minlength=BINS).tolist() for which in (is_kept, ~is_kept))
    return ScoreRecord(tuple(kept), tuple(removed), _threshold(values[is_kept], values[~is_kept], axis))


def _threshold(kept: Tensor, removed: Tensor, axis: ScoreAxis) -> float | None:
    if not len(removed) or removed.max() > kept.min():
        return None
    below, above = float(removed.max()), float(kept.min())
    return (below * above) ** 0.5 if axis.scale == "log" and below > 0 else (below + above) / 2
