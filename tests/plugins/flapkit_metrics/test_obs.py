"""OBS is what is lost when the other units take a unit's place."""

from __future__ import annotations

import pytest
import torch
from flapkit_compensators.least_squares import LeastSquares
from flapkit_metrics.obs import OBS
from planted import measured, site_of

from flapkit.interfaces import Gram


def test_it_is_the_error_of_least_squares():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=draw) @ torch.randn(6, 6, generator=draw) + 3
    weight = torch.randn(4, 6, generator=draw)
    site, stats = site_of(units=3, width=2), measured(x, OBS(), width=2)
    score = OBS(ridge=1e-9).score(site, stats, weight)
    for unit in range(3):
        keep = [other for other in range(3) if other != unit]
        correction = LeastSquares(ridge=0.0).correct(site, stats, weight, keep)
        repaired = x[:, site.channels_of(keep)] @ correction.weight.T.float() + correction.bias.float()
        lost = (x @ weight.T - repaired).square().sum(dim=1).mean()
        torch.testing.assert_close(score[unit, 0], lost.double(), rtol=1e-3, atol=0)


def test_what_others_can_say_is_worth_nothing():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(100, 5, generator=draw)
    x[:, 4] = x[:, 0] - 2 * x[:, 1]
    score = OBS(ridge=1e-6).score(site_of(units=5, width=1), measured(x, OBS()), torch.ones(4, 5))
    assert score[[0, 1, 4]].max() < 1e-4 * score[[2, 3]].min()


def test_dead_channels():
    score = OBS().score(site_of(units=4, width=1), measured(torch.zeros(9, 4), OBS()), torch.ones(4, 4))
    assert torch.isfinite(score).all()


@pytest.mark.parametrize(("units", "width"), [(12, 1), (5, 4), (80, 1)])
def test_greedy_removes_what_costs_least_after_each_repair(units, width):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, units * width, generator=draw) @ torch.randn(units * width, units * width, generator=draw)
    weight = torch.randn(4, units * width, generator=draw).double()
    site, stats = site_of(units=units, width=width), measured(x, OBS(), width=width)
    score = OBS(ridge=1e-6, greedy=True).score(site, stats, weight).flatten()
    covariance = stats[Gram].covariance[0]
    covariance.diagonal().add_(1e-6 * covariance.diagonal().mean())

    def error(keep: list[int]) -> float:
        kept = torch.tensor(site.channels_of(keep))
        gone = torch.tensor([channel for channel in range(site.channels) if channel not in set(kept.tolist())])
        cross = covariance[gone][:, kept]
        left = covariance[gone][:, gone] - cross @ torch.linalg.solve(covariance[kept][:, kept], cross.T)
        return float(((weight[:, gone] @ left) * weight[:, gone]).sum())

    left, before, reached = list(range(units)), 0.0, 0.0
    for _ in range(min(8, units - 1)):
        errors = {unit: error([other for other in left if other != unit]) for unit in left}
        lowest = min(left, key=errors.__getitem__)
        reached = max(reached, errors[lowest] - before)
        assert score[lowest].item() == pytest.approx(reached, rel=1e-3)
        left.remove(lowest)
        before = errors[lowest]
    assert score[torch.tensor(left)].min() >= reached * (1 - 1e-3)
