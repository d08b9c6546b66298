"""The interfaces of metrics, structure searchers and compensators."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from flapkit.model.budget import Budget, unit_costs
from flapkit.model.component import Component
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.model.surgery import Correction
from flapkit.pruning.gates import Gates
from flapkit.pruning.recovery import Recovery, Training
from flapkit.pruning.statistics import SiteStatistics, Statistic
from flapkit.system.errors import RecipeError


class CalibratedComponent(Component):
    """A component that uses statistics of the calibration text."""

    statistics: ClassVar[tuple[type[Statistic], ...]] = ()
    """The statistics to measure on the calibration text; no others are measured."""

    def measures(self) -> tuple[type[Statistic], ...]:
        """List the statistics to measure; override this where they depend on the options."""
        return self.statistics


def needed_statistics(components: Iterable[CalibratedComponent]) -> tuple[type[Statistic], ...]:
    """List the statistics that components need, without duplicates."""
    return tuple(dict.fromkeys(statistic for component in components for statistic in component.measures()))


class ImportanceMetric(CalibratedComponent):
    """Scores how important each unit is.

    A complete metric:

    ```python
    @dataclass(frozen=True)
    class MeanMagnitude(ImportanceMetric):
        name = "mean_magnitude"
        statistics = (Moments,)

        def score(self, site, stats, weight):
            return stats[Moments].mean.abs().view(site.units, -1)
    ```
    """

    scores_experts: ClassVar[bool] = False
    """Whether it scores whole experts too: the units of sites of the kind ``mixture``."""

    @abstractmethod
    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score the units of one site; units with low scores are removed first.

        Args:
            site: the site to score.
            stats: the statistics of the consumer's input.
            weight: the consumer's weight [out_features, channels], in the model's dtype.

        Returns:
            Scores [units, k]: k is ``site.channels_per_unit`` for one score per channel, or 1 for one score per unit.
        """


class StructureSearcher(Component):
    """Chooses the units to keep; standardisation and ranking are its responsibility."""

    uses_scores: ClassVar[bool] = True
    """Whether it uses the metric's scores; if false, nothing is measured for them and ``scores`` is empty."""

    takes_nested: ClassVar[bool] = False
    """Whether it chooses whole experts and channels of the others in one plan, as ``remove_lowest`` does."""

    @property
    def uniform(self) -> bool:
        """Tell whether all layers have the same sizes under every plan, as some export formats require."""
        return False

    def removes_blocks(self, sites: Sequence[Site]) -> bool:
        """Tell whether a plan may leave an attention or an MLP without units, which some export formats cannot hold.

        By default where an option ``min_units`` is 0.

        Args:
            sites: the prunable sites.
        """
        return getattr(self, "min_units", 1) == 0 and any(site.removable for site in sites)

    def tolerance(self, sites: Sequence[Site], budget: Budget) -> int:
        """Return by how much of its cost a plan may miss the budget; a plan that misses it by more is refused.

        By default, one unit of the site where they are largest. Override this in a searcher that rounds each layer or
        site separately: return ``sum(unit_costs(sites, budget.cost))``.

        Args:
            sites: the prunable sites.
            budget: how much to remove.
        """
        return max(unit_costs(sites, budget.cost), default=0)

    @abstractmethod
    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Choose the units to keep.

        Args:
            sites: the prunable sites, in the model's order.
            scores: site name -> scores [units, k], float64 on the CPU; empty where ``uses_scores`` is false.
            budget: how much to remove.

        Returns:
            A plan for exactly these sites.

        Raises:
            BudgetError: the budget cannot be met.
        """


class Objective(Protocol):
    """The objective of trial searchers; lower is better. The recipe's evaluation text is never used."""

    def __call__(self, plans: Sequence[PruningPlan], share: float = 1.0) -> list[float]:
        """Apply each plan to a copy of the model, with the recipe's compensators, and evaluate the copy.

        Plans that do not depend on each other's results should come in one call: layer by layer they share the reading
        of each layer.

        Args:
            plans: over exactly the sites that the searcher got.
            share: of the trial windows; the first ones are used.

        Returns:
            For each plan, on the held-out calibration windows, what the searcher's ``objective`` names: the perplexity,
            or the KL divergence from the dense model's predictions in nats per token.
        """


class TrialSearcher(StructureSearcher):
    """A searcher that evaluates candidate plans.

    ``search`` returns the plan that the trials start from; ``flapkit check`` uses it to check the budget. Scores and
    corrections are computed from the calibration windows that are not held out.
    """

    objective: Literal["perplexity", "kl"] = "perplexity"
    """What to minimise; a dataclass field of this name makes it an option."""

    @property
    def expected_trials(self) -> int | None:
        """How many trials there will be, for the progress bar; None if unknown."""
        return None

    @property
    def expected_passes(self) -> float | None:
        """How often the trial windows run through the model in all trials, at most, for the estimate; None if unknown.

        By default once in each trial. Override this in a searcher that tries plans on a share of the windows.
        """
        return self.expected_trials

    @abstractmethod
    def search_by_trials(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget, objective: Objective
    ) -> PruningPlan:
        """Choose the units to keep.

        Args:
            sites: the prunable sites, in the model's order.
            scores: as for ``search``.
            budget: how much to remove.
            objective: evaluates plans for exactly these sites.

        Raises:
            BudgetError: the budget cannot be met.
        """


class TrainedSearcher(StructureSearcher, CalibratedComponent):
    """A searcher that trains gates, with the model's weights frozen.

    It describes the gates and the training; the core runs it, on the calibration windows that are not held out, which
    alone are in the scores and statistics. The step with the lowest loss on the held-out windows counts. ``search``
    returns the plan that the gates start from; ``flapkit check`` uses it to check the budget. The recipe's evaluation
    text is never used.
    """

    @property
    @abstractmethod
    def training(self) -> Training:
        """How the gates are trained. The text is always the calibration text, in its own windows."""

    def operations(self, site: Site) -> int:
        """Return the multiply-accumulates of a site's gates for one token, for the estimate; by default none."""
        return 0

    @abstractmethod
    def gates(
        self,
        sites: Sequence[Site],
        scores: Mapping[str, Tensor],
        statistics: Mapping[str, SiteStatistics],
        budget: Budget,
    ) -> Gates:
        """Build the gates to train.

        Args:
            sites: the prunable sites, in the model's order.
            scores: as for ``search``.
            statistics: site name -> the statistics that the searcher declares.
            budget: how much to remove.

        Raises:
            BudgetError: the budget cannot be met.
        """


class Compensator(CalibratedComponent):
    """Repairs the loss: in closed form before slicing, by training after it, or both.

    A compensator overrides ``correct`` or ``recovery``. A recipe can name several: at most one of them may override
    ``correct``, and at most one ``recovery``.
    """

    def measures_in_sequence(self) -> tuple[type[Statistic], ...]:
        """List the statistics to measure at a site during sequential repair, when the sites before it are pruned.

        The statistics are then those of the pruned model's inputs; by default the same classes as otherwise, so that a
        site's own error is repaired. A compensator that can also repair the error of the
        earlier sites returns statistics with targets, such as ``TargetGram``.
        """
        return self.measures()

    @property
    def corrects(self) -> bool:
        """Tell whether it repairs in closed form: whether it overrides ``correct``."""
        return type(self).correct is not Compensator.correct

    @property
    def adds_bias(self) -> bool:
        """Tell whether pruned consumers may get a bias, which budgets count and some export formats cannot store.

        By default whether it repairs in closed form. Override it where the corrections never have a bias.
        """
        return self.corrects

    def correct(self, site: Site, stats: SiteStatistics, weight: Tensor, keep: Sequence[int]) -> Correction:
        """Compute the correction of one site.

        Args:
            site: the pruned site.
            stats: the statistics of the consumer's input.
            weight: the consumer's dense weight [out_features, channels], in the model's dtype.
            keep: the kept units, ascending.

        Returns:
            The correction; its tensors may have any floating dtype, and are cast to the model's.
        """
        return Correction()

    def recovery(self) -> Recovery | None:
        """Describe the training that repairs the sliced model, if there is one."""
        return None


def repairs_nothing(compensator: type[Compensator]) -> bool:
    """Tell whether a compensator overrides neither ``correct`` nor ``recovery``, for instance by a misspelt name."""
    return compensator.correct is Compensator.correct and compensator.recovery is Compensator.recovery


def corrector_of(compensators: Sequence[Compensator]) -> Compensator | None:
    """Return the compensator that corrects weights in closed form, if there is one.

    Raises:
        RecipeError: there are several; each would repair the same loss again.
    """
    correctors = [compensator for compensator in compensators if compensator.corrects]
    if len(correctors) > 1:
        names = " and ".join(repr(compensator.name) for compensator in correctors)
        raise RecipeError(f"compensators {names} correct the same weights; keep one of them")
    return correctors[0] if correctors else None


def recovery_of(compensators: Sequence[Compensator]) -> Recovery | None:
    """Return the training that a compensator describes, if there is one.

    Raises:
        RecipeError: there are several.
    """
    described = [(compensator.name, compensator.recovery()) for compensator in compensators]
    recoveries = [(name, recovery) for name, recovery in described if recovery is not None]
    if len(recoveries) > 1:
        names = " and ".join(repr(name) for name, _ in recoveries)
        raise RecipeError(f"compensators {names} train the same model; keep one of them")
    return recoveries[0][1] if recoveries else None
