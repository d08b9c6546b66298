"""Overlap: how much of an evaluation text is also in the calibration text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flapkit.text.windows import UNSCORED, Windows

NGRAM = 32
"""Length in tokens of a sequence that counts as shared; common phrases are shorter."""

NOTEWORTHY = 0.01
"""Fraction of scored tokens above which an overlap causes a warning."""

_MULTIPLIER = 0x2545F4914F6CDD1D
_CHUNK = 2**22


@dataclass(frozen=True, slots=True)
class Overlap:
    """Overlap of an evaluation text with the calibration windows.

    Args:
        ngram: length in tokens of the sequences that were compared.
        tokens: scored tokens that are part of a shared sequence.
        share: the same, as a fraction of all scored tokens.
    """

    ngram: int
    tokens: int
    share: float


def find_overlap(calibration: Tensor, evaluation: Windows, ngram: int | None = None) -> Overlap:
    """Count the scored tokens that are part of an n-gram which is also in the calibration windows.

    N-grams are looked up by a hash and then compared token by token, so that the count is exact.

    Args:
        calibration: tokens [windows, tokens], int64.
        evaluation: the evaluation windows.
        ngram: tokens per n-gram; by default ``NGRAM``, or half a window if that is less.

    Returns:
        The overlap, with the ``ngram`` that was used.
    """
    tokens = evaluation.input_ids
    shortest = min(calibration.shape[1], tokens.shape[1])
    # N-grams as long as a window would match only if both texts were cut at the same positions.
    ngram = min(NGRAM, max(1, shortest // 2)) if ngram is None else min(ngram, shortest)
    hashes = _hashes(tokens, ngram)
    starts = torch.zeros_like(hashes, dtype=torch.bool).flatten()
    # In parts: hashes and their order take four times the memory of the windows.
    for windows in calibration.split(max(1, _CHUNK // calibration.shape[1])):
        starts |= _shared(windows, tokens, hashes.flatten(), ngram)
    scored = evaluation.labels != UNSCORED
    shared = int((_covered(starts.view_as(hashes), tokens.shape[1]) & scored).sum())
    return Overlap(ngram, shared, shared / max(1, int(scored.sum())))


def _shared(calibration: Tensor, tokens: Tensor, hashes: Tensor, ngram: int) -> Tensor:
    """Tell which n-grams of the evaluation windows are in calibration windows too.

    Args:
        calibration: tokens [windows, tokens].
        tokens: the evaluation windows [windows, tokens].
        hashes: of the evaluation's n-grams, int64 [n-grams].
        ngram: tokens per n-gram.

    Returns:
        bool [n-grams].
    """
    known, order = _hashes(calibration, ngram).flatten().sort()
    nearest = torch.searchsorted(known, hashes).clamp_(max=len(known) - 1)
    candidates = (known[nearest] == hashes).nonzero().squeeze(1)
    shared = torch.zeros_like(hashes, dtype=torch.bool)
    for part in candidates.split(_CHUNK // ngram):
        shared[part] = _equal(calibration, order[nearest[part]], tokens, part, ngram)
    return shared


def _hashes(tokens: Tensor, ngram: int) -> Tensor:
    """Hash every n-gram: [windows, tokens] -> int64 [windows, tokens - ngram + 1], modulo 2^64."""
    places = tokens.shape[1] - ngram + 1
    hashes = torch.zeros_like(tokens[:, :places])
    for offset in range(ngram):
        hashes = hashes * _MULTIPLIER + tokens[:, offset : offset + places] + 1
    return hashes


def _equal(calibration: Tensor, first: Tensor, tokens: Tensor, second: Tensor, ngram: int) -> Tensor:
    """Compare n-grams token by token, given their flat positions in both texts, [n-grams]."""
    return (_ngrams(calibration, first, ngram) == _ngrams(tokens, second, ngram)).all(dim=1)


def _ngrams(tokens: Tensor, positions: Tensor, ngram: int) -> Tensor:
    """Read n-grams, [n-grams, ngram]."""
    ngrams: Tensor = tokens.unfold(1, ngram, 1)
    return ngrams[positions // ngrams.shape[1], positions % ngrams.shape[1]]


def _covered(starts: Tensor, length: int) -> Tensor:
    """Mark every token of the n-grams that start where ``starts`` is true: [windows, length]."""
    ngram = length - starts.shape[1] + 1
    steps = torch.zeros(len(starts), length + 1, dtype=torch.int32)
    steps[:, : starts.shape[1]] += starts.int()
    steps[:, ngram:] -= starts.int()
    return steps.cumsum(dim=1)[:, :length] > 0
