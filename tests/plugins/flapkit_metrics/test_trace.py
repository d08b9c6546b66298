"""The trace is what is lost when a unit is replaced by its mean."""

from __future__ import annotations

import pytest
import torch
from flapkit_metrics.trace import Trace
from flapkit_metrics.wifv import WIFV
from planted import measured, site_of


@pytest.fixture
def x() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(50, 6, generator=draw) @ torch.randn(6, 6, generator=draw) + 3


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def test_it_is_the_error_of_the_mean(x, weight):
    score = Trace().score(site_of(units=3, width=2), measured(x, Trace(), width=2), weight)
    for unit in range(3):
        own = slice(2 * unit, 2 * unit + 2)
        lost = (x - x.mean(dim=0))[:, own] @ weight[:, own].T
        torch.testing.assert_close(score[unit, 0], lost.square().sum(dim=1).mean().double(), rtol=1e-5, atol=0)


def test_of_single_channels_it_is_wifv(x, weight):
    site = site_of(units=6, width=1)
    stats = measured(x, Trace(), WIFV())
    trace, wifv = Trace().score(site, stats, weight), WIFV().score(site, stats, weight)
    torch.testing.assert_close(trace * len(x) / (len(x) - 1), wifv, rtol=1e-6, atol=0)
