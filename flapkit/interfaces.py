"""The five interfaces that a plugin can implement.

A component is a subclass written as a frozen dataclass: its fields are its options in a recipe, its class attribute
``name`` is what a recipe calls it. Components hold options, never the state of a run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias

from pydantic import ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flapkit.errors import RecipeError
from flapkit.plan import Budget, PruningPlan
from flapkit.sites import Kind, Site
from flapkit.statistics import SiteStatistics, Statistic

if TYPE_CHECKING:
    # Recoveries know text, and text knows how adapters render conversations.
    from flapkit.recovery import Recovery


class Component(ABC):
    """What all interfaces share."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    """What recipes call the component."""

    statistics: ClassVar[tuple[type[Statistic], ...]] = ()
    """What must be measured on the calibration text; nothing else is."""

    def measures(self) -> tuple[type[Statistic], ...]:
        """List what must be measured: ``statistics``, unless that depends on the options."""
        return self.statistics


class ImportanceMetric(Component):
    """How much each unit matters.

    A whole metric of your own:

    ```python
    @dataclass(frozen=True)
    class PeakToPeak(ImportanceMetric):
        name = "mean_abs"
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


Objective = Callable[[PruningPlan], float]
"""Carries a plan out on a copy of the model, with the recipe's compensators, and returns the copy's perplexity on the
held-out calibration windows; lower is better. Text that the recipe evaluates is never used."""


class TrialSearcher(StructureSearcher):
    """A searcher that tries plans out.

    ``search`` gives the plan that the trials start from; it is what ``flapkit check`` judges a budget by.
    """

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


@dataclass(frozen=True, slots=True)
class Correction:
    """What a compensator does to a consumer.

    Args:
        weight: the new weight [out_features, kept channels], or None to keep the old columns.
        bias: what is added to the output [out_features], or None for nothing.
        note: what is worth knowing about this site, in a short sentence; it is logged and goes into the output.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    note: str | None = None


class Compensator(Component):
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


class ArchitectureAdapter(Component):
    """Where the prunable places of a model family are."""

    @classmethod
    @abstractmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Tell whether a model of this configuration can be described."""

    @abstractmethod
    def sites(self, config: PreTrainedConfig) -> tuple[Site, ...]:
        """List the sites, in the model's order, from the configuration alone."""

    @property
    def title(self) -> str:
        """What ``flapkit check`` calls it."""
        return self.name

    def confirm(self, model: PreTrainedModel, sites: Sequence[Site]) -> None:
        """Raise ``ModelError`` where the sites turn out not to be those of the loaded model; asked before calibration.

        Args:
            model: the dense model, which is left as it is.
            sites: its sites.
        """
        return None

    def render(self, conversation: Sequence[Mapping[str, str]]) -> str | None:
        """Render a calibration conversation as this family was trained on it.

        Args:
            conversation: messages with ``role`` (``system``, ``user``, ``assistant``) and ``content``.

        Returns:
            The text, or None to use the tokenizer's own chat template.
        """
        return None


Runner: TypeAlias = Callable[[Tensor], Tensor]
"""Runs an exported file: tokens [n] -> logits [n, vocabulary], float32 on the CPU."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """A pruned model as far as it is known: before a run from the recipe, afterwards from the model itself.

    Args:
        family: model type of the dense models, such as ``llama``.
        config: the dense model's configuration before the run, the pruned one's afterwards.
        sites: the prunable places, at the sizes that the configuration has.
        uniform: all layers are alike, or will be.
        biases: the kinds of sites whose consumers hold a bias, or will.
    """

    family: str
    config: PreTrainedConfig
    sites: tuple[Site, ...]
    uniform: bool
    biases: frozenset[Kind]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A pruned checkpoint to export.

    Args:
        folder: where it lies; ``flapkit.load`` and safetensors read it.
        prospect: what it is.
        tokenizer: its tokenizer, if it has one.
    """

    folder: Path
    prospect: Prospect
    tokenizer: PreTrainedTokenizerBase | None


@dataclass(frozen=True)
class Exporter(Component):
    """A form that a pruned model is written in, for other programs to run.

    Every export is then run and compared with the pruned model.

    Args:
        verify: run what was written, and compare its logits with the pruned model's.
    """

    verify: Annotated[bool, Field(description="Run what was written, and compare it with the pruned model.")] = True

    suffix: ClassVar[str] = ""
    """Ending of the file that is written; empty for a folder."""

    extra: ClassVar[str] = ""
    """The extra of flapkit that installs ``packages``."""

    @property
    def packages(self) -> Sequence[str]:
        """Import names of the packages that the export needs beyond flapkit's own."""
        return ()

    @property
    def label(self) -> str:
        """What a recipe's export is called in the output folder; two exports of a recipe need two labels."""
        return self.name

    @property
    def tolerance(self) -> float | None:
        """The largest difference of a logit that passes, as a share of the largest logit; None: any finite one."""
        return 1e-4

    def check(self, prospect: Prospect) -> None:
        """Raise ``ModelError`` where such a model cannot be written, and say the way out; asked before a run, too."""
        return None

    @abstractmethod
    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write the model.

        Args:
            checkpoint: what to write; ``check`` has passed.
            path: a file that is not there yet, or an empty folder: see ``suffix``.
        """

    @abstractmethod
    def open(self, path: Path) -> AbstractContextManager[Runner]:
        """Load what ``write`` wrote into the program that it is for.

        Args:
            path: the file or folder.

        Returns:
            What runs it, for as long as the context lasts.
        """


COMPONENT_KINDS: Mapping[str, type[Any]] = {
    "metric": ImportanceMetric,
    "searcher": StructureSearcher,
    "compensator": Compensator,
    "adapter": ArchitectureAdapter,
    "exporter": Exporter,
}
"""The kind of a component, as messages call it -> its interface."""
