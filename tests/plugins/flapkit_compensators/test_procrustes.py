"""Procrustes: what it promises, site by site and for whole models."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from flapkit_compensators.bias import Bias
from flapkit_compensators.none import NoCompensation
from flapkit_compensators.procrustes import Procrustes
from planted import measured, site_of
from pydantic import TypeAdapter, ValidationError

import flapkit
from flapkit.api import PruneOptions
from flapkit.pruning.gram import Gram, TargetGram
from flapkit.pruning.statistics import SiteStatistics

KEPT = [0, 2, 3, 4, 5]


@pytest.fixture
def x() -> torch.Tensor:
    """Inputs [400, 6] whose channels say much of each other."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(400, 3, generator=draw) @ torch.randn(3, 6, generator=draw)
    return (common + 0.3 * torch.randn(400, 6, generator=draw) + 2).double()


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()


def correct(compensator, x, weight):
    return compensator.correct(site_of(6, 1), measured(x, compensator), weight, KEPT)


def output(x, weight, correction) -> torch.Tensor:
    """Return the outputs [tokens, 4] of a repaired consumer."""
    repaired = x[:, KEPT] @ (weight[:, KEPT] if correction.weight is None else correction.weight).T
    return repaired if correction.bias is None else repaired + correction.bias


def error(x, weight, correction) -> float:
    return float((x @ weight.T - output(x, weight, correction)).square().sum(dim=1).mean())


@pytest.mark.parametrize("ridge", [0.0, 0.1, 10.0])
def test_never_worse_than_bias_on_the_calibration_text(x, weight, ridge):
    assert error(x, weight, correct(Procrustes(ridge=ridge), x, weight)) < error(x, weight, correct(Bias(), x, weight))
    nothing = error(x, weight, correct(NoCompensation(), x, weight))
    without = correct(Procrustes(intercept=False, ridge=ridge), x, weight)
    assert without.bias is None
    assert error(x, weight, without) < nothing


@pytest.mark.parametrize("intercept", [True, False])
def test_no_rotation_is_better(x, weight, intercept):
    """It is a rotation of the kept columns, and every other rotation has a larger error."""
    best = correct(Procrustes(intercept=intercept, ridge=0.0), x, weight)
    left = weight[:, KEPT]
    torch.testing.assert_close(best.weight.T @ best.weight, left.T @ left)
    for seed in range(20):
        skew = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).double()
        other = torch.linalg.matrix_exp(0.1 * (skew - skew.T)) @ best.weight
        bias = weight @ x.mean(dim=0) - other @ x[:, KEPT].mean(dim=0) if intercept else None
        assert error(x, weight, flapkit.interfaces.Correction(other, bias)) > error(x, weight, best)


def test_a_large_ridge_is_bias(x, weight):
    """The weight stays, and the mean is corrected."""
    found, bias = correct(Procrustes(ridge=1e12), x, weight), correct(Bias(), x, weight)
    torch.testing.assert_close(found.weight, weight[:, KEPT])
    torch.testing.assert_close(found.bias, bias.bias)


def test_in_sequence_a_rotated_target_is_met(x, weight):
    """The targets are a rotation of the kept channels' output, moved: nothing of it is lost."""
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).double())[0]
    target = x[:, KEPT] @ weight[:, KEPT].T @ turn.T + 5
    gram = TargetGram(10)
    gram.update(torch.cat([x, target], dim=1))
    found = Procrustes(ridge=0.0).correct(site_of(6, 1), SiteStatistics([gram]), weight, KEPT)
    torch.testing.assert_close(output(x, weight, found), target)


def test_fewer_tokens_than_outputs(x, weight):
    found = correct(Procrustes(), x[:3], weight)
    assert error(x[:3], weight, found) <= error(x[:3], weight, correct(Bias(), x[:3], weight))


def test_dead_inputs_stay_finite(weight):
    found = correct(Procrustes(), torch.zeros(40, 6).double(), weight)
    assert torch.isfinite(found.weight).all()
    assert not found.bias.any()


def test_in_float32_as_in_float64(x, weight, monkeypatch):
    exact = correct(Procrustes(), x, weight)
    monkeypatch.setattr(Gram, "widest_in_float64", 5)
    torch.testing.assert_close(correct(Procrustes(), x, weight).weight.double(), exact.weight, atol=1e-4, rtol=1e-4)


def test_a_negative_ridge_is_refused():
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        TypeAdapter(Procrustes).validate_python({"ridge": -1.0})


@torch.no_grad()
@pytest.mark.parametrize("sequential", [False, True])
def test_closer_to_the_dense_model_than_bias(tokens, sequential):
    """On the calibration text itself, for a random model; one window is enough to run."""
    dense = make_llama()(tokens).logits
    distance = {}
    for name in ("bias", "procrustes"):
        model = make_llama()
        flapkit.prune_(model, tokens, compensator=name, ratio=0.3, options=PruneOptions(sequential=sequential))
        distance[name] = float((model(tokens).logits - dense).square().mean())
    assert distance["procrustes"] < distance["bias"]
    flapkit.prune_(make_llama(), tokens[:1], compensator="procrustes")
