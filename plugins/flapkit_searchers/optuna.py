"""Optuna: search the ratios of all sites by trials."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from flapkit.interfaces import (
    Budget,
    Count,
    InputError,
    Objective,
    PruningPlan,
    Site,
    TrialSearcher,
    raise_attention,
    remove_lowest,
    standardise,
)
from flapkit_searchers.al_am import ALAM
from flapkit_searchers.options import AttentionPower, MinUnits

if TYPE_CHECKING:
    from optuna import Study

log = logging.getLogger(__name__)

Ratios = Mapping[str, float]
"""Site name -> the fraction of its units to remove, before all are scaled to the budget."""


@dataclass(frozen=True)
class Optuna(TrialSearcher):
    """Search the ratios of all sites by trials, starting from those of AL-AM, with Optuna's TPE sampler.

    Within a site the lowest scores go first, as in ``al_am``. Each trial prunes a copy, repairs it with the
    recipe's compensators, and measures its perplexity on held-out calibration windows; each plan meets the budget.
    Optuna (Akiba et al., KDD 2019); TPE (Bergstra et al., NIPS 2011). Needs the extra ``flapkit[optuna]``.
    """

    name = "optuna"

    trials: Annotated[Count, Field(ge=1, description="Number of plans to try; the first is that of AL-AM.")] = 50
    objective: Annotated[
        Literal["perplexity"],
        Field(description="What to minimise: perplexity on held-out calibration windows."),
    ] = "perplexity"
    spread: Annotated[
        float, Field(gt=0, le=1, description="Maximum difference between a site's ratio and AL-AM's.")
    ] = 0.3
    storage: Annotated[
        str | None,
        Field(description="Optuna's storage, such as `sqlite:///trials.db`; an interrupted search resumes from it."),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Seed of the sampler.")] = 0
    min_units: MinUnits = 1
    attention_power: AttentionPower = 2.0

    @property
    def expected_trials(self) -> int:
        """How many trials there will be."""
        return self.trials + 1

    def search(self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget) -> PruningPlan:
        """Return AL-AM's plan, the start of the trials."""
        return ALAM(self.min_units, self.attention_power).search(sites, scores, budget)

    def search_by_trials(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor], budget: Budget, objective: Objective
    ) -> PruningPlan:
        """Return the best plan of all trials."""
        start = self.search(sites, scores, budget)
        ratios = {site.name: 1 - len(start.keep[site.name]) / site.units for site in sites}
        ranks = self._ranks(sites, scores)

        def plan_of(chosen: Ratios) -> PruningPlan:
            # A site with twice the ratio loses twice the fraction of its units, whatever the budget.
            ranking = {name: rank / max(chosen[name], 1e-9) for name, rank in ranks.items()}
            return remove_lowest(sites, ranking, budget, self.min_units)

        def try_out(trial: Any) -> float:
            chosen = {
                name: trial.suggest_float(name, max(0.0, ratio - self.spread), min(1.0, ratio + self.spread))
                for name, ratio in ratios.items()
            }
            (perplexity,) = objective([plan_of(chosen)])
            return perplexity if math.isfinite(perplexity) else math.inf

        # The start's perplexity distinguishes studies with other compensators, models or text.
        study = self._study(_digest(self, scores, budget, *objective([start])))
        if not _finished(study):
            study.enqueue_trial(ratios)
        study.optimize(try_out, n_trials=max(0, self.trials - _finished(study)))
        first = next(trial.value for trial in study.trials if trial.value is not None)
        log.info(
            "optuna: perplexity %.3f at first, %.3f at best (trials: %d)", first, study.best_value, _finished(study)
        )
        return plan_of(study.best_params)

    def _ranks(self, sites: Sequence[Site], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rank each site's units [units]: the fraction of the site's units with the same or a lower score."""
        raised = raise_attention(sites, scores, self.attention_power)
        ranks = {}
        for name, values in raised.items():
            value = standardise(values).mean(dim=1)
            order = value.argsort(stable=True)
            ranks[name] = torch.empty_like(value)
            ranks[name][order] = torch.arange(1, len(value) + 1, dtype=value.dtype) / len(value)
        return ranks

    def _study(self, digest: str) -> Study:
        try:
            import optuna
        except ImportError as error:
            raise InputError('searcher optuna needs a package: pip install "flapkit[optuna]"') from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study(storage=self.storage, study_name=f"flapkit {digest}", load_if_exists=True)
        except Exception as error:
            raise InputError(f"searcher.storage {self.storage}: {type(error).__name__}: {error}") from error
        # Otherwise resumed trials would repeat the first draws.
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + _finished(study))
        return study


def _finished(study: Study) -> int:
    return sum(trial.state.is_finished() for trial in study.trials)


def _digest(searcher: Optuna, scores: Mapping[str, Tensor], budget: Budget, start: float) -> str:
    """Hash everything that the trials depend on, to name the study."""
    options = (searcher.spread, searcher.min_units, searcher.attention_power)
    digest = hashlib.sha256(f"{budget!r} {options} {start:.5g}".encode())
    for name, values in scores.items():
        digest.update(name.encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]
