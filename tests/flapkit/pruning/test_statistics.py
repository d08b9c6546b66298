"""Statistics are exact, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flapkit.pruning.gram import STRIPS, Gram, UnitGram
from flapkit.pruning.moments import Moments
from flapkit.pruning.statistics import SiteStatistics
from flapkit.system.errors import CalibrationError


def measured(of, *batches: torch.Tensor, **options):
    found = of(batches[0].shape[1], **options)
    for batch in batches:
        found.update(batch)
    return found


def moments(*batches: torch.Tensor) -> Moments:
    return measured(Moments, *batches)


def gram(*batches: torch.Tensor, of: type[Gram] = Gram, **options) -> Gram:
    return measured(of, *batches, **options)


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


@pytest.mark.parametrize("seen", [1, 2, 500])
@pytest.mark.parametrize("away", [1e-3, 1e2, 1e7])
def test_a_mean_that_jumps_between_batches_costs_no_precision(seen, away):
    x = torch.randn(1500, 3, generator=torch.Generator().manual_seed(seen), dtype=torch.float64) + 10
    x[seen:] += away
    torch.testing.assert_close(moments(*x.split([seen, 1500 - seen])).variance, x.var(dim=0), rtol=1e-12, atol=0)


def test_float64_inputs_stay_as_they_are():
    x = correlated(5)
    before = x.clone()
    moments(x)
    gram(x)
    assert torch.equal(x, before)


def test_constant_channels_have_no_variance():
    assert moments(*torch.full((9, 2), 0.1).split(2)).variance.tolist() == [0.0, 0.0]


def test_two_tokens_are_needed():
    with pytest.raises(CalibrationError, match="two tokens"):
        _ = moments(torch.ones(1, 2)).variance


@pytest.mark.parametrize("of", [Moments, Gram])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_known(of, value):
    x = torch.zeros(4, 2)
    assert measured(of, x).is_finite()
    x[1, 1] = value
    assert not measured(of, x).is_finite()


def test_a_statistic_that_was_not_measured():
    with pytest.raises(KeyError, match="declare it in `statistics`"):
        SiteStatistics([])[Moments]


def correlated(seed: int, tokens: int = 60, channels: int = 6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=draw, dtype=torch.float64)
    return x @ torch.randn(channels, channels, generator=draw, dtype=torch.float64) + 100


@settings(deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 2**31))
def test_the_gram_is_torchs_own_covariance(sizes, seed):
    x = correlated(seed, 2 + sum(sizes))
    found = gram(*x.split([2, *sizes]))
    assert found.tokens == len(x)
    torch.testing.assert_close(found.mean, x.mean(dim=0))
    torch.testing.assert_close(found.covariance[0], torch.cov(x.T, correction=0))


def test_the_gram_knows_no_order():
    x = correlated(0)
    one, other = gram(*x.split(7)), gram(*x.flip(0).split(11))
    torch.testing.assert_close(one.covariance, other.covariance)


def test_blocks_are_the_grams_own():
    x = correlated(1)
    whole, blocks = gram(x).covariance[0], gram(*x.split(9), of=UnitGram, blocks=3).covariance
    for unit in range(3):
        channels = slice(2 * unit, 2 * unit + 2)
        torch.testing.assert_close(blocks[unit], whole[channels, channels])


def test_a_wide_gram_is_kept_in_float32(monkeypatch):
    monkeypatch.setattr(Gram, "widest_in_float64", 5)
    x = correlated(2)
    found = gram(*x.split(9))
    assert found.spread.squares.dtype == torch.float32
    expected = torch.cov(x.T, correction=0)
    torch.testing.assert_close(found.covariance[0].double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize(("of", "options"), [(Moments, {}), (Gram, {}), (UnitGram, {"blocks": 2})])
def test_ranks_are_merged_exactly(of, options):
    """Three ranks' states, as they are gathered; one of the ranks saw nothing."""
    x = correlated(4)
    ranks = [of(6, **options) for _ in range(3)]
    for rank, part in zip(ranks, (x[:7], x[7:], x[:0]), strict=True):
        rank.update(part)
        rank.merge_()
    merged, whole = of(6, **options), of(6, **options)
    whole.update(x)
    merged.combine_([rank.state for rank in ranks])
    assert merged.tokens == len(x)
    torch.testing.assert_close(merged.mean, whole.mean)
    torch.testing.assert_close(merged.spread.squares, whole.spread.squares)


@pytest.mark.parametrize("width", [64 * STRIPS, 64 * STRIPS + 45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wide_gram_is_computed_in_strips(width, dtype):
    """Whole whenever it is read: between batches, after a merge of ranks, and restored from its state."""
    x = (correlated(6, 400, 16) @ torch.randn(16, width, dtype=torch.float64)).to(dtype)
    expected = torch.cov(x.T.double(), correction=0)
    read = Gram(width)
    for part in x.split(150):
        read.update(part)
        assert torch.equal(read.spread.squares, read.spread.squares.mT)
    ranks = [gram(x[:150]), gram(x[150:])]
    merged, restored = Gram(width), Gram(width)
    merged.combine_([rank.state for rank in ranks])
    for name, value in gram(*x.split(150)).state.items():
        setattr(restored, name, value)
    for found in (read, merged, restored):
        covariance = found.covariance[0]
        assert torch.equal(covariance, covariance.T)
        torch.testing.assert_close(covariance, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_a_product_that_overflows_is_known():
    """Each input and its mean are finite; the products of the channels are not."""
    x = torch.zeros(4, 64 * STRIPS)
    x[0, 3] = 1e30
    assert not gram(x).is_finite()


def test_a_covariance_needs_two_tokens():
    with pytest.raises(CalibrationError, match="a covariance needs two tokens, and 1 was seen"):
        _ = gram(torch.ones(1, 2)).covariance


KINDS = [(Moments, {}), (Gram, {}), (UnitGram, {"blocks": 2})]


def weighed(of, options, *batches: tuple[torch.Tensor, torch.Tensor]):
    statistic = of(6, **options)
    for x, weights in batches:
        statistic.update(x, weights)
    return statistic


def assert_equal_spreads(found, expected):
    for one, other in zip(found.spread, expected.spread, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("of", "options"), KINDS)
def test_a_weight_is_a_number_of_tokens(of, options):
    """As if each were seen that often, in several batches, some of which count for nothing."""
    x, often = correlated(0) + 3, torch.arange(60) % 4
    expected = measured(of, x.repeat_interleave(often, dim=0), **options)
    weights = often.float()
    found = weighed(of, options, (x[:7], weights[:7]), (x[:5], torch.zeros(5)), (x[7:], weights[7:]))
    assert_equal_spreads(found, expected)


@pytest.mark.parametrize(("of", "options"), KINDS)
def test_only_ratios_of_weights_matter_to_mean_and_spread(of, options):
    x, weights = correlated(1), torch.rand(60, generator=torch.Generator().manual_seed(2))
    one, other = (weighed(of, options, (x, factor * weights)).spread for factor in (1.0, 1e-4))
    torch.testing.assert_close(other.mean, one.mean)
    torch.testing.assert_close(other.squares / other.tokens, one.squares / one.tokens, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weighted_mean_of_narrow_types_is_exact(dtype):
    x, weights = (correlated(3) + 100).to(dtype), torch.rand(60, generator=torch.Generator().manual_seed(4))
    expected = (weights.double() @ x.double()) / weights.double().sum()
    for of, options in KINDS:
        torch.testing.assert_close(weighed(of, options, (x, weights)).mean, expected, rtol=1e-6, atol=0)
