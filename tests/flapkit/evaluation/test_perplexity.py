from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from flapkit.evaluation import perplexity
from flapkit.evaluation.perplexity import Perplexity, cross_entropy
from flapkit.system.errors import RunError
from flapkit.text.windows import UNSCORED, cut_windows


def random_case(windows: int = 5, tokens: int = 7, vocabulary: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(windows, tokens, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (windows, tokens), generator=generator)
    labels[:, 0] = UNSCORED
    return logits, labels


def test_it_is_torchs_cross_entropy_of_the_next_token() -> None:
    logits, labels = random_case()
    nll, targets = cross_entropy(logits, labels)
    for window in range(len(logits)):
        expected = functional.cross_entropy(logits[window, :-1], labels[window, 1:], reduction="sum")
        torch.testing.assert_close(nll[window], expected)
    assert targets.tolist() == [6] * 5


def test_tokens_that_are_context_only_do_not_count() -> None:
    logits, labels = random_case()
    labels[1, 1:4] = UNSCORED
    labels[2] = UNSCORED
    nll, targets = cross_entropy(logits, labels)
    torch.testing.assert_close(nll[1], functional.cross_entropy(logits[1, 3:-1], labels[1, 4:], reduction="sum"))
    assert targets.tolist() == [6, 3, 0, 6, 6]
    assert nll[2] == 0


def test_the_first_label_is_never_scored() -> None:
    logits, labels = random_case()
    expected = cross_entropy(logits, labels)
    labels[:, 0] = 3
    assert torch.equal(cross_entropy(logits, labels)[0], expected[0])


@pytest.mark.parametrize("elements", [1, 22, 50, 10**9])
def test_pieces_make_no_difference(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = random_case()
    expected = cross_entropy(logits, labels)[0]
    monkeypatch.setattr(perplexity, "CHUNK_ELEMENTS", elements)
    torch.testing.assert_close(cross_entropy(logits, labels)[0], expected, rtol=1e-6, atol=0)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits, labels = random_case()
    half = logits.bfloat16()
    nll, _ = cross_entropy(half, labels)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, cross_entropy(half.float(), labels)[0])


def released(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """The released code's eval_ppl_wikitext: each window's mean times its length, over all lengths."""
    length = tokens.shape[1]
    losses = [
        functional.cross_entropy(logits[window, :-1], tokens[window, 1:]).item() * length
        for window in range(len(tokens))
    ]
    return math.exp(sum(losses) / (len(tokens) * length))


def test_the_released_protocol() -> None:
    logits, _ = random_case(windows=6)
    windows = cut_windows(torch.arange(45) % 11, 7)
    metric = Perplexity()
    metric.update(*cross_entropy(logits, windows.labels))
    values = metric.compute()
    assert values.over_windows.item() == pytest.approx(released(logits, windows.input_ids), rel=1e-6)
    assert values.over_tokens.item() == pytest.approx(values.over_windows.item(), rel=1e-12)


def test_the_two_means_by_hand() -> None:
    metric = Perplexity()
    metric.update(torch.tensor([6.0, 1.0, 0.0]), torch.tensor([3, 1, 0]))
    values = metric.compute()
    assert values.over_tokens.item() == pytest.approx(math.exp(7 / 4), rel=1e-12)
    assert values.over_windows.item() == pytest.approx(math.exp(1.5), rel=1e-12)
    assert (int(metric.windows), int(metric.targets)) == (2, 4)


def test_batches_and_ranks_make_no_difference() -> None:
    nll, targets = cross_entropy(*random_case(windows=9))
    whole, parts, ranks = Perplexity(), Perplexity(), [Perplexity(), Perplexity()]
    whole.update(nll, targets)
    for batch in (slice(0, 4), slice(4, 5), slice(5, 9)):
        parts.update(nll[batch], targets[batch])
    for rank, metric in enumerate(ranks):
        metric.update(nll[rank::2], targets[rank::2])
    merged = ranks[0]
    merged.merge_state(ranks[1])
    for metric in (parts, merged):
        for value, expected in zip(metric.compute(), whole.compute(), strict=True):
            assert value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_many_small_losses_are_not_lost() -> None:
    """In float32 the sum would stop growing at 2^24."""
    metric = Perplexity()
    metric.update(torch.tensor([2.0**25]), torch.tensor([2**25]))
    for _ in range(100):
        metric.update(torch.tensor([1.0]), torch.tensor([1]))
    assert metric.nll.item() == 2.0**25 + 100
    assert metric.half().bfloat16().nll.dtype == torch.float64


def test_a_loss_that_is_not_finite() -> None:
    for loss in (math.nan, math.inf):
        metric = Perplexity()
        metric.update(torch.tensor([1.0]), torch.tensor([2]))
        assert metric.is_finite()
        metric.update(torch.tensor([loss]), torch.tensor([2]))
        assert not metric.is_finite()


def test_nothing_was_scored() -> None:
    metric = Perplexity()
    metric.update(torch.tensor([0.0]), torch.tensor([0]))
    with pytest.raises(RunError, match="no token was scored"):
        metric.compute()


def test_it_starts_afresh() -> None:
    metric = Perplexity()
    metric.update(torch.tensor([5.0]), torch.tensor([1]))
    metric.reset()
    metric.update(torch.tensor([1.0]), torch.tensor([1]))
    assert metric.compute().over_tokens.item() == pytest.approx(math.e, rel=1e-12)
