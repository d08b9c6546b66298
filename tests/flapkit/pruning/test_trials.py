"""Searchers that try plans: what their objective measures, and that it leaves the model alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import make_llama

import flapkit
from flapkit.execution.lightning.data import PruningData
from flapkit.pruning.components import TrialSearcher
from flapkit.pruning.ranking import remove_lowest
from flapkit.pruning.trials import held_out_windows, perplexity_of
from flapkit.system.errors import CalibrationError, RecipeError


@dataclass(frozen=True)
class Backwards(TrialSearcher):
    """Tries the order of the units both ways, and keeps the worse."""

    name = "backwards"
    tried: ClassVar[list] = []

    def search(self, sites, scores, budget):
        return remove_lowest(sites, {site.name: torch.arange(site.units) * 1.0 for site in sites}, budget)

    def search_by_trials(self, sites, scores, budget, objective):
        other = remove_lowest(sites, {site.name: -torch.arange(site.units) * 1.0 for site in sites}, budget)
        plans = [self.search(sites, scores, budget), other]
        values = [objective(plan) for plan in plans]
        self.tried.append(values)
        return plans[values.index(max(values))]


def test_held_out_windows_are_one_in_four(tokens):
    batches = held_out_windows(PruningData(tokens, batch_size=5).predict_dataloader())
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), tokens[3::4])


def test_without_held_out_windows(tokens):
    with pytest.raises(CalibrationError, match="at least four"):
        held_out_windows([{"input_ids": tokens}])


@torch.no_grad()
def test_perplexity_is_over_attended_tokens(tokens):
    model = make_llama()
    whole = perplexity_of(model, [{"input_ids": tokens}])
    loss = model(tokens, labels=tokens).loss
    assert whole == pytest.approx(float(loss.exp()), rel=1e-5)
    padded = torch.cat([tokens, torch.full_like(tokens[:, :5], 7)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens[:, :5])], dim=1)
    assert perplexity_of(model, [{"input_ids": padded, "attention_mask": mask}]) == pytest.approx(whole, rel=1e-5)


def test_the_objective_is_what_the_pruned_model_will_be_worth(llama, tokens):
    """The trials leave no trace in the model, and the plan that comes back is the one that is carried out."""
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    seen = []

    class Watched(Backwards):
        def search_by_trials(self, sites, scores, budget, objective):
            plan = super().search_by_trials(sites, scores, budget, objective)
            seen.append(all(torch.equal(t, before[n]) for n, t in llama.state_dict().items()))
            return plan

    plan = flapkit.prune_(llama, tokens, searcher=Watched(), ratio=0.3)
    assert seen == [True]
    first, second = Backwards.tried[-1]
    assert first != second
    held_out = held_out_windows(PruningData(tokens).predict_dataloader())
    assert perplexity_of(llama, held_out) == pytest.approx(max(first, second), rel=1e-5)
    assert plan.keep


def test_trials_need_all_statistics_in_memory(tokens):
    with pytest.raises(RecipeError, match=r"raise calibration\.statistics_memory"):
        flapkit.prune_(make_llama(), tokens, searcher=Backwards(), options=flapkit.PruneOptions(statistics_memory=10))
