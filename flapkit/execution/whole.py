"""The stages of a run whose model is whole in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from flapkit.execution.calibrate import calibrate_and_prune_
from flapkit.execution.resume import ResumeStore
from flapkit.execution.runtime import Measured, Runtime, evaluate
from flapkit.model.plan import Budget
from flapkit.model.site import Site
from flapkit.pruning.collector import Statistics
from flapkit.pruning.method import Pruned
from flapkit.pruning.site_errors import SiteError, Trace
from flapkit.recipe import LoadedRecipe
from flapkit.run.samples import compare_pruned, trace_dense
from flapkit.run.text import EvaluationText, RunText


@dataclass(frozen=True, slots=True)
class Whole:
    """A run's model, whole in memory; ``flapkit.execution.layerwise.Layers`` has the same methods.

    Args:
        recipe: what to do.
        model: the model, pruned in place.
        sites: the dense model's sites.
        runtime: what it runs on, and whom it tells how far it is.
        cache: folder of the statistics; None for none.
        kept: what a stopped run has left, and where this one keeps what it finishes; None for nowhere.
    """

    recipe: LoadedRecipe
    model: PreTrainedModel
    sites: Sequence[Site]
    runtime: Runtime
    cache: Path | None
    kept: ResumeStore | None = None

    @property
    def shards(self) -> Sequence[Path]:
        """The files that hold the pruned weights already: none."""
        return ()

    def evaluate(self, texts: Mapping[str, EvaluationText], name: str) -> dict[str, Measured]:
        """Measure the perplexity of each text; ``name`` is what the stage is called."""
        return evaluate(self.model, texts, self.runtime, name)

    def see(self, trace: Trace | None) -> None:
        """Keep what the dense model's consumers see and give."""
        trace_dense(self.model, self.sites, trace, self.runtime)

    def prune(self, budget: Budget, text: RunText) -> tuple[Statistics, Pruned]:
        """Calibrate and prune; return the statistics that are still in memory, and what was decided."""
        return calibrate_and_prune_(
            self.model, self.sites, self.recipe, budget, text, self.runtime, self.cache, self.kept
        )

    def compare(self, trace: Trace | None, pruned: Pruned) -> Mapping[str, SiteError]:
        """Measure how far the output of each pruned site is from the dense one."""
        return compare_pruned(self.model, self.sites, trace, pruned, self.runtime)
