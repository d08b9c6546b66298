"""The stages of a run whose model is whole in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from flapkit.calibration import Statistics
from flapkit.evaluation.site_errors import SiteError, Trace
from flapkit.kept import Kept
from flapkit.plan import Budget
from flapkit.pruning import Pruned
from flapkit.recipe import LoadedRecipe
from flapkit.sites import Site
from flapkit.stages.calibrate import calibrate_and_prune_
from flapkit.stages.loops import Loops, Measured, evaluate
from flapkit.stages.report import compare_pruned, trace_dense
from flapkit.stages.text import EvaluationText, RunText


@dataclass(frozen=True, slots=True)
class Whole:
    """A run's model, whole in memory; ``flapkit.stages.layerwise.Layers`` has the same methods.

    Args:
        recipe: what to do.
        model: the model, pruned in place.
        sites: the dense model's sites.
        loops: what it runs on, and whom it tells how far it is.
        cache: folder of the statistics; None for none.
        kept: what a stopped run has left, and where this one keeps what it finishes; None for nowhere.
    """

    recipe: LoadedRecipe
    model: PreTrainedModel
    sites: Sequence[Site]
    loops: Loops
    cache: Path | None
    kept: Kept | None = None

    @property
    def shards(self) -> Sequence[Path]:
        """The files that hold the pruned weights already: none."""
        return ()

    def evaluate(self, texts: Mapping[str, EvaluationText], name: str) -> dict[str, Measured]:
        """Measure the perplexity of each text; ``name`` is what the stage is called."""
        return evaluate(self.model, texts, self.loops, name)

    def see(self, trace: Trace | None) -> None:
        """Keep what the dense model's consumers see and give."""
        trace_dense(self.model, self.sites, trace, self.loops)

    def prune(self, budget: Budget, text: RunText) -> tuple[Statistics, Pruned]:
        """Calibrate and prune; return the statistics that are still in memory, and what was decided."""
        return calibrate_and_prune_(
            self.model, self.sites, self.recipe, budget, text, self.loops, self.cache, self.kept
        )

    def compare(self, trace: Trace | None, pruned: Pruned) -> Mapping[str, SiteError]:
        """Measure how far the output of each pruned site is from the dense one."""
        return compare_pruned(self.model, self.sites, trace, pruned, self.loops)
