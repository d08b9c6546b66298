"""Statistics are exact, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flapkit.errors import CalibrationError
from flapkit.statistics import Moments, SiteStatistics


def moments(*batches: torch.Tensor) -> Moments:
    found = Moments(batches[0].shape[1])
    for batch in batches:
        found.update(batch)
    return found


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 2**31))
def test_moments_are_torchs_own(sizes, seed):
    x = torch.randn(2 + sum(sizes), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5 + 100
    found = moments(*x.split([2, *sizes]))
    assert found.tokens == len(x)
    torch.testing.assert_close(found.mean, x.mean(dim=0))
    torch.testing.assert_close(found.variance, x.var(dim=0))
    torch.testing.assert_close(found.second_moment, x.square().mean(dim=0))


def test_a_small_variance_beside_a_large_mean_is_not_lost():
    """A sum of squares in float32 would lose it."""
    x = 1e4 + torch.tensor([[-0.01], [0.0], [0.01]], dtype=torch.float64).repeat(1000, 1)
    torch.testing.assert_close(moments(*x.split(7)).variance, x.var(dim=0))


def test_constant_channels_have_no_variance():
    assert moments(*torch.full((9, 2), 0.1).split(2)).variance.tolist() == [0.0, 0.0]


def test_two_tokens_are_needed():
    with pytest.raises(CalibrationError, match="two tokens"):
        _ = moments(torch.ones(1, 2)).variance


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_known(value):
    x = torch.zeros(4, 2)
    x[1, 1] = value
    assert not moments(x).is_finite()
    assert moments(torch.zeros(4, 2)).is_finite()


def test_a_statistic_that_was_not_measured():
    with pytest.raises(KeyError, match="declare it in `statistics`"):
        SiteStatistics([])[Moments]
