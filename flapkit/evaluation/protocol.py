"""How a perplexity was measured: what has to agree before two numbers can be compared."""

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
        length: tokens in a window.
        stride: tokens from one window's beginning to the next's; None where windows do not overlap.
        mean: over ``windows`` (FLAP's released code) or over ``tokens`` (strided).
        windows: how many were measured.
        bos: whether the text begins with the tokenizer's start token; no window gets one of its own.
        tokens: how many were scored.
        bytes: UTF-8 bytes of the text that the scored tokens stand for; None where the tokenizer does not say.
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
    """Cut a text into windows, and say how it is measured.

    Args:
        text: the whole text.
        length: tokens in a window.
        stride: tokens from one window's beginning to the next's.
        limit: windows at most.
        bos: the tokenizer's start token, if it has one.

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
    # Cut as the tokens were, so that each size lies where its token does.
    return int(cut_windows(sizes, length, stride, limit).input_ids[scored].sum())


def perplexity(values: PerplexityValues, protocol: Protocol) -> float:
    """Return the perplexity by the mean that the protocol names."""
    return float(values.over_windows if protocol.mean == "windows" else values.over_tokens)


def bits_per_byte(values: PerplexityValues, protocol: Protocol) -> float | None:
    """Return the cross-entropy in bits for each byte of scored text, which other tokenizers' can be compared with.

    None where the tokenizer does not say which text its tokens stand for, or where that text is empty.
    """
    if not protocol.bytes:
        return None
    return float(values.nll.to(torch.float64)) / (math.log(2) * protocol.bytes)


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """Windows to measure the perplexity of, and how.

    Args:
        windows: the text.
        protocol: how it is measured.
        batch_size: windows that go through the model at once; ``auto`` for as many as fit.
        overlap: what it shares with the calibration text; None where there is no calibration.
    """

    windows: Windows
    protocol: Protocol
    batch_size: BatchSize
    overlap: Overlap | None = None


@dataclass(frozen=True, slots=True)
class MeasuredPerplexity:
    """A model's perplexity of one text.

    Args:
        text: the text, and how it was measured.
        perplexity: by the mean that the text's protocol names.
        bits_per_byte: cross-entropy for each byte of scored text; None where the tokenizer does not say which bytes.
        batch_size: windows that went through the model at once.
    """

    text: EvaluationText
    perplexity: float
    bits_per_byte: float | None
    batch_size: int
