from __future__ import annotations

import pytest
import torch

from flapkit.text import overlap
from flapkit.text.overlap import find_overlap
from flapkit.text.windows import UNSCORED, cut_windows


def brute_force(calibration: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor, ngram: int) -> int:
    known = {tuple(row[start : start + ngram].tolist()) for row in calibration for start in range(len(row) - ngram + 1)}
    count = 0
    for row, label in zip(tokens, labels, strict=True):
        covered = set()
        for start in range(len(row) - ngram + 1):
            if tuple(row[start : start + ngram].tolist()) in known:
                covered.update(range(start, start + ngram))
        count += sum(int(label[place]) != UNSCORED for place in covered)
    return count


@pytest.mark.parametrize("ngram", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk", [4, 2**22])
def test_it_counts_what_a_plain_search_counts(ngram: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_CHUNK", max(chunk, ngram))
    generator = torch.Generator().manual_seed(ngram)
    calibration = torch.randint(0, 4, (6, 9), generator=generator)
    windows = cut_windows(torch.randint(0, 4, (80,), generator=generator), 8, 5)
    found = find_overlap(calibration, windows, ngram)
    assert found.tokens == brute_force(calibration, windows.input_ids, windows.labels, ngram)
    assert found.share == found.tokens / int((windows.labels != UNSCORED).sum())


def test_a_text_overlaps_itself() -> None:
    text = torch.arange(64)
    assert find_overlap(text.view(2, 32), cut_windows(text, 32)).share == 1.0


def test_texts_that_share_single_tokens_do_not_overlap() -> None:
    text = torch.arange(64)
    assert find_overlap(text.flip(0).view(1, 64), cut_windows(text, 64)).tokens == 0


def test_a_hash_alone_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a multiplier of one every order of the same tokens has the same hash."""
    monkeypatch.setattr(overlap, "_MULTIPLIER", 1)
    assert find_overlap(torch.tensor([[1, 2, 3, 4]]), cut_windows(torch.tensor([4, 3, 2, 1]), 4), 4).tokens == 0


def test_a_row_is_at_most_half_a_window() -> None:
    found = find_overlap(torch.arange(10).view(1, 10), cut_windows(torch.arange(60), 6))
    # Tokens 0 to 5, of which the first is not scored, and 6 to 9, whose first is not either.
    assert (found.ngram, found.tokens) == (3, 5 + 3)
    assert find_overlap(torch.arange(99).view(1, 99), cut_windows(torch.arange(99), 99)).ngram == 32


def test_parts_of_the_calibration_text_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randint(0, 3, (40, 16), generator=generator)
    evaluation = cut_windows(torch.randint(0, 3, (160,), generator=generator), 16)
    whole = find_overlap(calibration, evaluation, 6)
    monkeypatch.setattr(overlap, "_CHUNK", 3 * 16)
    assert find_overlap(calibration, evaluation, 6) == whole
    assert 0 < whole.share < 1
