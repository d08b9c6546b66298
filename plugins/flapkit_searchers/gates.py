"""Gates: learn which units to keep by gradients, with the weights frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from flapkit.interfaces import (
    Budget,
    Count,
    Gates,
    Gram,
    Moments,
    PruningPlan,
    Site,
    SiteStatistics,
    Statistic,
    TrainedSearcher,
    Training,
    divergence,
    next_token_loss,
    remove_lowest,
)
from flapkit_searchers.options import MinUnits
from flapkit_searchers.order import places

RIDGE = 1e-2
"""Added to the kept channels' covariance, as a fraction of the mean variance."""


@dataclass(frozen=True)
class GateTraining(TrainedSearcher):
    """Train one gate per unit, with the weights frozen, to make the pruned model predict like the dense one.

    In every step the lowest gates are closed until the budget is met exactly, each at what it costs; the
    gradient passes this step straight through, less the part along the budget. After GRASPrune (arXiv 2604.19398);
    the divergence from the dense model is that of DDP (arXiv 2603.08065).

    With ``stand_in: fit``, a closed channel is replaced by its least-squares fit to the open ones. The loss is then
    that of the model after a repair by least squares, and a gate's gradient is the effect of the part that the other
    channels cannot reproduce. With ``stand_in: mean``, it is replaced by its mean, as with FLAP's bias. No scale is
    learned, because least squares fits the kept columns afterwards, which includes every scale.

    The gates start in the order of the metric's scores within each site: all MLPs lose the same ratio, attentions
    about half of it. The lower the ratio (or the fewer units stay), the further apart the initial values are, so that
    one step always opens and closes a similar share of the units.
    """

    name = "gates"

    steps: Annotated[Count, Field(ge=1, description="Optimizer steps.")] = 100
    batch_size: Annotated[
        Count, Field(ge=1, description="Windows that go through the model at once, on each device.")
    ] = 4
    lr: Annotated[
        float,
        Field(
            gt=0,
            le=10,
            description="Peak learning rate; at a ratio of 0.5 gates start between 0 and 2, otherwise further apart.",
        ),
    ] = 0.05
    warmup: Annotated[
        float, Field(ge=0, lt=1, description="Fraction of the steps in which the learning rate rises before it falls.")
    ] = 0.05
    cross_entropy: Annotated[
        float, Field(ge=0, description="Weight of the cross-entropy, beside the divergence from the dense model.")
    ] = 0.0
    stand_in: Annotated[
        Literal["fit", "mean"],
        Field(description="What replaces a closed channel: the fit of the open ones, or its mean, in less memory."),
    ] = "fit"
    refresh: Annotated[Count, Field(ge=1, description="Batches between two computations of the stand-ins.")] = 10
    validate_every: Annotated[Count, Field(ge=1, description="Steps between validations.")] = 20
    validation_windows: Annotated[Count, Field(ge=1, description="Held-out calibration windows to validate on.")] = 32
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Seed of the order of the windows.")] = 0
    min_units: MinUnits = 1

    @property
    def training(self) -> Training:
        """How the gates are trained."""
        return Training(
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            warmup=self.warmup,
            validate_every=self.validate_every,
            validation_windows=self.validation_windows,
            seed=self.seed,
        )

    def measures(self) -> tuple[type[Statistic], ...]:
        """Return the statistics that the stand-ins need."""
        return (Gram,) if self.stand_in == "fit" else (Moments,)

    def operations(self, site: Site) -> int:
        """Return the multiply-accumulates of the stand-ins for one token."""
        return site.channels**2 if self.stand_in == "fit" else 0

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Return the plan that the gates start from."""
        first = {site.name: _first(site, scores[site.name]) for site in sites}
        return remove_lowest(sites, first, budget, self.min_units)

    def gates(
        self,
        sites: Sequence[Site],
        scores: Mapping[str, Tensor],
        statistics: Mapping[str, SiteStatistics],
        budget: Budget,
    ) -> BudgetGates:
        """Build the gates."""
        # A step moves a gate by about the learning rate, however few units go: they lie further apart for that.
        ratio = budget.amount / budget.cost.of_all(sites)
        spread = 0.5 / min(ratio, 1 - ratio)
        first = {site.name: spread * _first(site, scores[site.name]) for site in sites}
        channels = {site.name: _channels(site, statistics[site.name]) for site in sites}
        return BudgetGates(self, sites, first, channels, budget)


class BudgetGates(Gates):
    """One gate per unit; those with the lowest values are closed until the budget is met.

    Args:
        options: the searcher's options.
        sites: the gated sites.
        first: site name -> the gates' first values [units].
        channels: site name -> the mean of its channels [channels], and their covariance [channels, channels] or None.
        budget: how much to remove.
    """

    def __init__(
        self,
        options: GateTraining,
        sites: Sequence[Site],
        first: Mapping[str, Tensor],
        channels: Mapping[str, tuple[Tensor, Tensor | None]],
        budget: Budget,
    ) -> None:
        super().__init__()
        self._options = options
        self._sites = {site.name: site for site in sites}
        self._budget = budget
        self.values = nn.Parameter(torch.cat([first[site.name] for site in sites]).float())
        costs = [torch.full((site.units,), float(budget.cost.of(site))) for site in sites]
        self.register_buffer("costs", torch.cat(costs), persistent=False)
        self._stand_ins = {name: StandIn(self._sites[name], *of_site) for name, of_site in channels.items()}
        self._fits = nn.ModuleDict()
        for number, name in enumerate(self._stand_ins):
            self._fits[str(number)] = self._stand_ins[name]
        self._open: dict[str, Tensor] = {}
        self._plan: PruningPlan | None = None
        self._age = 0

    def plan(self) -> PruningPlan:
        """Return the plan of the open gates."""
        values = self.values.detach().cpu().split([site.units for site in self._sites.values()])
        ranking = dict(zip(self._sites, values, strict=True))
        return remove_lowest(list(self._sites.values()), ranking, self._budget, self._options.min_units)

    def update(self) -> None:
        """Open and close gates, and compute the stand-ins if they are due: always to validate."""
        plan = self.plan()
        if self._plan is None or self._age >= self._options.refresh or not self.training:
            if plan != self._plan:
                self._fit(plan)
            # Training goes on with new stand-ins after a validation, and also where it is resumed after one.
            self._age = 0 if self.training else self._options.refresh
        self._age += 1
        kept = torch.cat([_kept(site, plan) for site in self._sites.values()]).to(self.values)
        gates = self._straight_through(kept) if self.training else kept
        self._open = dict(zip(self._sites, gates.split([site.units for site in self._sites.values()]), strict=True))

    def forward(self, site: str, inputs: Tensor) -> Tensor:
        """Replace the closed channels by their stand-ins; gradients reach open and closed gates alike."""
        gates = self._open[site].repeat_interleave(self._sites[site].channels_per_unit).to(inputs.dtype)
        stand_in = self._stand_ins[site](inputs, gates.detach())
        return torch.lerp(stand_in, inputs, gates.expand_as(inputs))

    def loss(self, logits: Tensor, dense: Tensor, tokens: Tensor, attended: Tensor) -> Tensor:
        """Return the divergence from the dense model, plus the weighted cross-entropy."""
        loss = divergence(logits, dense, attended)
        if self._options.cross_entropy:
            loss = loss + self._options.cross_entropy * next_token_loss(logits, tokens, attended)
        return loss

    def _straight_through(self, kept: Tensor) -> Tensor:
        gates: Tensor = _StraightThrough.apply(self.values, kept, self.costs)  # type: ignore[no-untyped-call]
        return gates

    def _fit(self, plan: PruningPlan) -> None:
        for name, stand_in in self._stand_ins.items():
            stand_in.fit_(plan.keep[name])
        self._plan = plan


class StandIn(nn.Module):
    """What the open channels of a site tell of each channel.

    Args:
        site: the site.
        mean: of its channels [channels].
        covariance: of its channels [channels, channels]; None to use the mean alone.
    """

    mean: Tensor
    covariance: Tensor | None
    rows: Tensor | None
    matrix: Tensor | None

    def __init__(self, site: Site, mean: Tensor, covariance: Tensor | None) -> None:
        super().__init__()
        self._site = site
        for name, value in (("mean", mean), ("covariance", covariance)):
            self.register_buffer(name, None if value is None else value.float(), persistent=False)
        # The channels that were open when the fit was made, and what each of them tells of all [rows, channels].
        for name in ("rows", "matrix"):
            self.register_buffer(name, None, persistent=False)

    def forward(self, inputs: Tensor, open_: Tensor) -> Tensor:
        """Return the stand-in of every channel, whether it is open or not.

        Args:
            inputs: [windows, tokens, channels].
            open_: 1 for an open channel, 0 for a closed one [channels].
        """
        mean = self.mean.to(inputs.dtype)
        if self.matrix is None or self.rows is None:
            return mean.expand_as(inputs)
        seen = ((inputs - mean) * open_).flatten(0, -2).index_select(1, self.rows)
        # Mixed precision multiplies in another dtype.
        return torch.addmm(mean, seen, self.matrix.to(inputs.dtype)).view_as(inputs).to(inputs.dtype)

    @torch.no_grad()
    def fit_(self, keep: Sequence[int]) -> None:
        """Fit every channel by the open ones, an open one by those of the other units.

        With C the covariance of the open channels (with a ridge) and P its inverse: a closed channel r is C_r P x; what
        an open unit u has beyond the others is (P_uu)^-1 P_u x, the residual of its regression.

        Args:
            keep: the open units.
        """
        if self.covariance is None or not keep:
            self.rows = self.matrix = None
            return
        self.rows = torch.tensor(self._site.channels_of(keep), device=self.covariance.device)
        with torch.autocast(self.covariance.device.type, enabled=False):
            self.matrix = self._fitted(self.covariance, self.rows)

    def _fitted(self, covariance: Tensor, kept: Tensor) -> Tensor:
        width, units = self._site.channels_per_unit, len(kept) // self._site.channels_per_unit
        closed = torch.ones(len(covariance), device=kept.device).index_fill_(0, kept, 0).nonzero()[:, 0]
        rows = covariance.index_select(0, kept)
        inner = rows.index_select(1, kept)
        inner.diagonal().add_(RIDGE * covariance.diagonal().mean() or 1)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(inner))
        blocks = inverse.view(units, width, -1)
        own = blocks.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        residual = torch.linalg.solve(own, blocks).reshape_as(inverse)
        residual.diagonal().sub_(1)
        matrix = torch.empty_like(rows)
        matrix[:, kept] = -residual.T
        matrix[:, closed] = inverse @ rows.index_select(1, closed)
        return matrix


class _StraightThrough(torch.autograd.Function):
    """Gates that are 0 or 1, with the gradient of the values that chose them, less its part along the budget."""

    @staticmethod
    def forward(context: Any, values: Tensor, kept: Tensor, costs: Tensor) -> Tensor:
        """Return the gates."""
        context.save_for_backward(costs)
        return kept.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of each value: what its unit gains for a share of the budget, less the mean."""
        (costs,) = context.saved_tensors
        total = costs.sum()
        return total * (gradients[0] / costs - gradients[0].sum() / total), None, None


def _first(site: Site, scores: Tensor) -> Tensor:
    """Return the gates' first values [units]: each unit's place among those of its run, up to 1; attentions up to 2."""
    return (places(site, scores) + 0.5) / site.units_per_run * (2 if site.kind == "attention" else 1)


def _channels(site: Site, statistics: SiteStatistics) -> tuple[Tensor, Tensor | None]:
    """Return the mean of a site's channels [channels], and their covariance if it was measured."""
    if Gram in statistics:
        return statistics[Gram].mean, statistics[Gram].covariance[0]
    return statistics[Moments].mean, None


def _kept(site: Site, plan: PruningPlan) -> Tensor:
    """Return 1 for the units that a plan keeps [units], 0 for the others."""
    return torch.zeros(site.units).index_fill_(0, torch.tensor(plan.keep[site.name], dtype=torch.long), 1.0)
