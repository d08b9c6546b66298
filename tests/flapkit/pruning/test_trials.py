"""Trials: what plans are judged by, and what is remembered of them."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from torch.nn import functional

import flapkit
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import Correction, apply_plan_
from flapkit.pruning import trials
from flapkit.pruning.trials import Judge, Trials, held_out_windows, running


def windows(tokens):
    return held_out_windows([{"input_ids": tokens, "held_out": torch.arange(len(tokens)) % 2 == 1}])


def half(sites):
    return PruningPlan({site.name: tuple(range(site.units // 2)) for site in sites})


def test_held_out_windows_are_gathered_in_batches(tokens):
    batches = [{"input_ids": part, "held_out": torch.arange(len(part)) % 4 == 3} for part in tokens.split(8)]
    found = held_out_windows(batches)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in found]), tokens[3::4])
    assert len(found) == -(-len(tokens[3::4]) // trials.TRIAL_WINDOWS)


def test_the_dense_model_diverges_from_itself_by_nothing(llama, tokens):
    run = running(llama, windows(tokens))
    assert Judge("kl", windows(tokens), run)(run) == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_the_divergence_is_torchs_own(llama, tokens):
    """Where all tokens are among the likeliest ones."""
    sites, batches = flapkit.sites(llama), windows(tokens)
    run = running(llama, batches)
    judge = Judge("kl", batches, run)
    wanted = torch.cat([llama(batch["input_ids"]).logits for batch in batches]).flatten(0, 1).log_softmax(dim=-1)
    apply_plan_(llama, sites, half(sites), {})
    found = torch.cat([llama(batch["input_ids"]).logits for batch in batches]).flatten(0, 1).log_softmax(dim=-1)
    expected = functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
    assert judge(run) == pytest.approx(float(expected), rel=1e-4)


def test_few_likeliest_tokens_make_the_divergence_smaller(llama, tokens, monkeypatch):
    sites, batches = flapkit.sites(llama), windows(tokens)
    run = running(llama, batches)
    all_of_them = Judge("kl", batches, run)
    monkeypatch.setattr(trials, "LIKELIEST", 8)
    few = Judge("kl", batches, run)
    apply_plan_(llama, sites, half(sites), {})
    assert 0 < few(run) < all_of_them(run)


@pytest.mark.parametrize(("memory", "computed"), [(1e9, 1), (0, 3)])
def test_corrections_are_computed_once_as_far_as_memory_goes(tokens, memory, computed):
    model = make_llama()
    sites, calls = flapkit.sites(model), []

    def correct(some, plan):
        calls.extend(site.name for site in some)
        return {site.name: Correction(bias=torch.ones(site.out_features)) for site in some}

    tries = Trials(model, sites, "perplexity", windows(tokens), correct, memory)
    assert tries(half(sites)) == tries(half(sites)) == tries(half(sites))
    assert len(calls) == computed * len(sites)
    assert tries(half(sites), 0.1) > 0
