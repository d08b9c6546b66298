"""Metrics, structure searchers and compensators: the interfaces of what prunes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from flapkit.model.component import Component
from flapkit.model.plan import Budget, PruningPlan
from flapkit.model.site import Site
from flapkit.model.surgery import Correction
from flapkit.pruning.recovery import Recovery
from flapkit.pruning.statistics import SiteStatistics, Statistic
from flapkit.system.errors import RecipeError


class CalibratedComponent(Component):
    """A component that works from statistics of the calibration text."""

    statistics: ClassVar[tuple[type[Statistic], ...]] = ()
    """What must be measured on the calibration text; nothing else is."""

    def measures(self) -> tuple[type[Statistic], ...]:
        """List what must be measured: ``statistics``, unless that depends on the options."""
        return self.statistics


def needed_statistics(components: Iterable[CalibratedComponent]) -> tuple[type[Statistic], ...]:
    """List the statistics that some components need, each once."""
    return tuple(dict.fromkeys(statistic for component in components for statistic in component.measures()))


class ImportanceMetric(CalibratedComponent):
    """How much each unit matters.

    A whole metric of your own:

    ```python
    @dataclass(frozen=True)
    class MeanMagnitude(ImportanceMetric):
        name = "mean_magnitude"
        statistics = (Moments,)

        def score(self, site, stats, weight):
            return stats[Moments].mean.abs().view(site.units, -1)
    ```
    """

    @abstractmethod
    def score(self, site: Site, stats: SiteStatistics, weight: Tensor) -> Tensor:
        """Score the units of one site; low goes first.

        Args:
            site: the place to score.
            stats: what was measured about the consumer's input.
            weight: the consumer's weight [out_features, channels], in the model's dtype.

        Returns:
            Scores [units, k]: k is ``site.channels_per_unit`` for a score of every channel, or 1 for one of the
            whole unit.
        """


class StructureSearcher(Component):
    """Which units go: it owns standardisation and ranking."""

    uses_scores: ClassVar[bool] = True
    """Whether it looks at the metric's scores; where it does not, nothing is measured for them, and it gets none."""

    @property
    def uniform(self) -> bool:
        """Tell whether every plan leaves all layers alike, which some export formats need."""
        return False

    @abstractmethod
    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Find the units to keep.

        Args:
            sites: the prunable sites, in the model's order.
            scores: site name -> scores [units, k], float64 on the CPU; empty where ``uses_scores`` is false.
            budget: how many parameters to remove.

        Returns:
            A plan over exactly these sites.

        Raises:
            BudgetError: the budget cannot be met.
        """


class Objective(Protocol):
    """What plans are tried by; lower is better. Text that the recipe evaluates is never used."""

    def __call__(self, plan: PruningPlan, share: float = 1.0) -> float:
        """Carry a plan out on a copy of the model, with the recipe's compensators, and judge the copy.

        Args:
            plan: over exactly the sites that the searcher got.
            share: of the trial windows; the first ones are used.

        Returns:
            On the held-out calibration windows, what the searcher's ``objective`` names: the perplexity, or the KL
            divergence from the dense model's predictions in nats per token.
        """


class TrialSearcher(StructureSearcher):
    """A searcher that tries plans out.

    ``search`` gives the plan that the trials start from; it is what ``flapkit check`` judges a budget by.
    """

    objective: Literal["perplexity", "kl"] = "perplexity"
    """What to minimise; a dataclass field of this name makes it an option."""

    @property
    def expected_trials(self) -> int | None:
        """How many trials there will be, for the progress bar; None if unknown."""
        return None

    @abstractmethod
    def search_by_trials(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget, objective: Objective
    ) -> PruningPlan:
        """Find the units to keep.

        Args:
            sites: the prunable sites, in the model's order.
            scores: as ``search`` gets them.
            budget: how many parameters to remove.
            objective: says what a plan over exactly these sites is worth.

        Raises:
            BudgetError: the budget cannot be met.
        """


class Compensator(CalibratedComponent):
    """How the loss is repaired: in closed form before slicing, by a training after it, or both.

    A compensator overrides ``correct`` or ``recovery``. A recipe can name several: at most one of them corrects, and at
    most one recovers.
    """

    def measures_in_sequence(self) -> tuple[type[Statistic], ...]:
        """List what must be measured of a site whose earlier sites are pruned already.

        The statistics are then those of the pruned model's inputs. A compensator that can make good what the earlier
        sites lost names statistics with targets here, such as ``TargetGram``.
        """
        return self.measures()

    @property
    def corrects(self) -> bool:
        """Tell whether it repairs in closed form."""
        return type(self).correct is not Compensator.correct

    @property
    def adds_bias(self) -> bool:
        """Tell whether pruned consumers get a bias, which some export formats cannot hold."""
        return self.corrects

    def correct(self, site: Site, stats: SiteStatistics, weight: Tensor, keep: Sequence[int]) -> Correction:
        """Compute the repair of one site.

        Args:
            site: the place that is pruned.
            stats: what was measured about the consumer's input.
            weight: the consumer's dense weight [out_features, channels], in the model's dtype.
            keep: the kept units, ascending.

        Returns:
            The correction; its tensors may be of any floating dtype, and are cast to the model's.
        """
        return Correction()

    def recovery(self) -> Recovery | None:
        """Describe the training that repairs the sliced model, if there is one."""
        return None


def repairs_nothing(compensator: type[Compensator]) -> bool:
    """Tell whether a compensator overrides neither of the two ways to repair, as one with a misspelt method does."""
    return compensator.correct is Compensator.correct and compensator.recovery is Compensator.recovery


def corrector_of(compensators: Sequence[Compensator]) -> Compensator | None:
    """Return the compensator that corrects weights in closed form, if there is one.

    Raises:
        RecipeError: several do, and each would repair the whole loss once more.
    """
    correctors = [compensator for compensator in compensators if compensator.corrects]
    if len(correctors) > 1:
        names = " and ".join(repr(compensator.name) for compensator in correctors)
        raise RecipeError(f"compensators {names} correct the same weights; keep one of them")
    return correctors[0] if correctors else None


def recovery_of(compensators: Sequence[Compensator]) -> Recovery | None:
    """Return the training that a compensator describes, if there is one.

    Raises:
        RecipeError: several describe one.
    """
    described = [(compensator.name, compensator.recovery()) for compensator in compensators]
    recoveries = [(name, recovery) for name, recovery in described if recovery is not None]
    if len(recoveries) > 1:
        names = " and ".join(repr(name) for name, _ in recoveries)
        raise RecipeError(f"compensators {names} train the same model; keep one of them")
    return recoveries[0][1] if recoveries else None
