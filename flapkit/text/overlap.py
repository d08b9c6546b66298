"""How much of an evaluation text was in the calibration text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flapkit.text.windows import UNSCORED, Windows

NGRAM = 32
"""Tokens in a row that count as the same text; a licence's or an idiom's few words do not."""

NOTEWORTHY = 0.01
"""The share of scored tokens from which an overlap is worth a warning."""

_MULTIPLIER = 0x2545F4914F6CDD1D
_CHUNK = 2**22


@dataclass(frozen=True, slots=True)
class Overlap:
    """What an evaluation text shares with the calibration windows.

    Args:
        ngram: tokens in a row that count as shared.
        tokens: scored tokens that lie in such a row.
        share: the same as a fraction of all scored tokens.
    """

    ngram: int
    tokens: int
    share: float


def find_overlap(calibration: Tensor, evaluation: Windows, ngram: int | None = None) -> Overlap:
    """Find the scored tokens that lie in a row of tokens which calibration saw too.

    Rows are found by a hash and compared token by token, so that nothing is counted that is not the same.

    Args:
        calibration: tokens [windows, tokens], int64.
        evaluation: what is measured.
        ngram: tokens in a row; by default ``NGRAM``, or half a window where that is less.

    Returns:
        The overlap, with the ``ngram`` that was used.
    """
    tokens = evaluation.input_ids
    shortest = min(calibration.shape[1], tokens.shape[1])
    # Rows as long as a window would be found only where both texts were cut at the same places.
    ngram = min(NGRAM, max(1, shortest // 2)) if ngram is None else min(ngram, shortest)
    known, order = _hashes(calibration, ngram).flatten().sort()
    found = _hashes(tokens, ngram)
    place = torch.searchsorted(known, found.flatten()).clamp_(max=len(known) - 1)
    candidates = (known[place] == found.flatten()).nonzero().squeeze(1)
    alike = [_same(calibration, order[place[part]], tokens, part, ngram) for part in candidates.split(_CHUNK // ngram)]
    starts = torch.zeros_like(found, dtype=torch.bool).flatten()
    starts[candidates] = torch.cat(alike) if alike else torch.zeros(0, dtype=torch.bool)
    scored = evaluation.labels != UNSCORED
    shared = int((_covered(starts.view_as(found), tokens.shape[1]) & scored).sum())
    return Overlap(ngram, shared, shared / max(1, int(scored.sum())))


def _hashes(tokens: Tensor, ngram: int) -> Tensor:
    """Hash every row of ``ngram`` tokens: [windows, tokens] -> int64 [windows, tokens - ngram + 1], modulo 2^64."""
    places = tokens.shape[1] - ngram + 1
    hashes = torch.zeros_like(tokens[:, :places])
    for offset in range(ngram):
        hashes = hashes * _MULTIPLIER + tokens[:, offset : offset + places] + 1
    return hashes


def _same(calibration: Tensor, known: Tensor, tokens: Tensor, found: Tensor, ngram: int) -> Tensor:
    """Compare rows token by token; both are given by their flat places, [rows]."""
    return (_rows(calibration, known, ngram) == _rows(tokens, found, ngram)).all(dim=1)


def _rows(tokens: Tensor, places: Tensor, ngram: int) -> Tensor:
    """Read rows, [rows, ngram]."""
    rows: Tensor = tokens.unfold(1, ngram, 1)
    return rows[places // rows.shape[1], places % rows.shape[1]]


def _covered(starts: Tensor, length: int) -> Tensor:
    """Mark every token of the rows that begin where ``starts`` is true: [windows, length]."""
    ngram = length - starts.shape[1] + 1
    steps = torch.zeros(len(starts), length + 1, dtype=torch.int32)
    steps[:, : starts.shape[1]] += starts.int()
    steps[:, ngram:] -= starts.int()
    return steps.cumsum(dim=1)[:, :length] > 0
