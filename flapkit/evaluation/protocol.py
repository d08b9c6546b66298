"""The protocol of a perplexity: what must be equal before two perplexities can be compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flapkit.evaluation.perplexity import PerplexityValues
from flapkit.evaluation.scores import BatchSize
from flapkit.text.overlap import Overlap
from flapkit.text.windows import UNSCORED, Encoded, Windows, cut_windows, tokens_hash


@dataclass(frozen=True, slots=True)
class Protocol:
    """How the perplexity of a text was measured.

    Args:
        length: tokens per window.
        stride: tokens from the start of one window to the next; None if windows do not overlap.
        mean: over ``windows`` (FLAP's released code) or over ``tokens`` (strided).
        windows: number of windows.
        bos: whether the text starts with the tokenizer's BOS token; it is not added to every window.
        tokens: number of scored tokens.
        bytes: UTF-8 bytes of the scored text; None if the tokenizer gives no offsets.
        tokens_sha256: hash of the windows, [windows, length].
    """

    length: int
    stride: int | None
    mean: Literal["windows", "tokens"]
    windows: int
    bos: bool
    tokens: int
    bytes: int | None
    tokens_sha256: str


def cut_text(
    text: Encoded, length: int, stride: int | None = None, limit: int | None = None, bos: int | None = None
) -> tuple[Windows, Protocol]:
    """Cut a text into windows, and describe the protocol.

    Args:
        text: the whole text.
        length: tokens per window.
        stride: tokens from the start of one window to the next.
        limit: maximum number of windows.
        bos: the tokenizer's BOS token, if it has one.

    Raises:
        DataError: the text is shorter than a window.
    """
    windows = cut_windows(text.tokens, length, stride, limit)
    scored = windows.labels != UNSCORED
    return windows, Protocol(
        length=length,
        stride=stride,
        mean="windows" if stride is None else "tokens",
        windows=len(windows),
        bos=bos is not None and int(text.tokens[0]) == bos,
        tokens=int(scored.sum()),
        bytes=_scored_bytes(text.sizes, scored, length, stride, limit),
        tokens_sha256=tokens_hash(windows.input_ids),
    )


def _scored_bytes(
    sizes: Tensor | None, scored: Tensor, length: int, stride: int | None, limit: int | None
) -> int | None:
    if sizes is None:
        return None
    # Cut like the tokens, so that sizes and tokens have the same positions.
    return int(cut_windows(sizes, length, stride, limit).input_ids[scored].sum())


def perplexity(values: PerplexityValues, protocol: Protocol) -> float:
    """Return the perplexity by the protocol's mean."""
    return float(values.over_windows if protocol.mean == "windows" else values.over_tokens)


def bits_per_byte(values: PerplexityValues, protocol: Protocol) -> float | None:
    """Return the cross-entropy in bits per byte of scored text, which is comparable between tokenizers.

    None if the tokenizer gives no offsets, or the scored text is empty.
    """
    if not protocol.bytes:
        return None
    return float(values.nll.to(torch.float64)) / (math.log(2) * protocol.bytes)


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """A text to measure the perplexity of, with its protocol.

    Args:
        windows: the text.
        protocol: how it is measured.
        batch_size: windows per batch; ``auto`` for as many as fit.
        overlap: its overlap with the calibration text; None if there is no calibration.
    """

    windows: Windows
    protocol: Protocol
    batch_size: BatchSize
    overlap: Overlap | None = None


@dataclass(frozen=True, slots=True)
class MeasuredPerplexity:
    """A model's perplexity of one text.

    Args:
        text: the text, with its protocol.
        perplexity: perplexity by the protocol's mean.
        bits_per_byte: cross-entropy in bits per byte of scored text; None if the tokenizer gives no offsets.
        batch_size: windows per batch.
    """

    text: EvaluationText
    perplexity: float
    bits_per_byte: float | None
    batch_size: int
