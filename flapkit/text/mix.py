"""Text of several sources, each with a share of the windows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from flapkit.system.errors import DataError
from flapkit.text.named import Purpose
from flapkit.text.source import Render, TextSource
from flapkit.text.windows import TokenStore, draw_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class MixedSource(TextSource):
    """A source of a mix, and how much of the text it makes up."""

    share: float = Field(
        default=1.0, gt=0, description="Its share of the windows, relative to the sum of the shares of all entries."
    )


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of one source.

    Args:
        texts: the documents.
        separator: text between documents; None to draw each window within one document.
        share: the source's share of the windows, relative to the sum of all shares.
        key: where the recipe names the source, for messages; empty where there is only one.
    """

    texts: Sequence[str]
    separator: str | None
    share: float = 1.0
    key: str = ""


@dataclass(frozen=True, slots=True)
class TextMix:
    """Where text comes from: one source or several.

    Args:
        sources: the sources.
        shares: the share of the windows of each, relative to their sum.
        keys: where the recipe names each, for messages; empty where there is only one.
    """

    sources: tuple[TextSource, ...]
    shares: tuple[float, ...]
    keys: tuple[str, ...]

    @classmethod
    def of(cls, source: TextSource, key: str = "") -> TextMix:
        """Return a single source as a mix.

        Args:
            source: the source.
            key: how messages call it; by default they name its dataset alone.
        """
        return cls((source,), (1.0,), (key,))

    @property
    def title(self) -> str:
        """The datasets by name, with their shares where there are several."""
        if len(self.sources) == 1:
            return self.sources[0].dataset
        whole = sum(self.shares)
        parts = zip(self.sources, self.shares, strict=True)
        return " + ".join(f"{source.dataset} ({share / whole:.3g})" for source, share in parts)

    def check(self, purpose: Purpose) -> None:
        """Raise ``DataError`` for errors that can be found without a network and without reading text."""
        for source, key in zip(self.sources, self.keys, strict=True):
            with naming(key):
                source.check(purpose)

    def documents(self, purpose: Purpose, render: Render | None = None) -> list[Documents]:
        """Read the documents of every source.

        Args:
            purpose: selects the default split.
            render: renders a conversation as text; None if the model has no format for conversations.

        Raises:
            DataError: the data cannot be found or read, or has no text.
        """
        read = []
        for source, share, key in zip(self.sources, self.shares, self.keys, strict=True):
            with naming(key):
                read.append(Documents(source.documents(purpose, render), source.separator(purpose), share, key))
        return read


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Put the key of a source in front of the messages of its ``DataError``, unless the key is empty."""
    try:
        yield
    except DataError as error:
        if not key:
            raise
        raise DataError(f"{key}: {error}") from error


def apportion(samples: int, shares: Sequence[float]) -> list[int]:
    """Divide windows by shares; what is left after rounding down goes to the largest remainders.

    Args:
        samples: windows to divide.
        shares: relative to their sum.

    Returns:
        The windows of each share; their sum is ``samples``.
    """
    exact = [samples * (share / sum(shares)) for share in shares]
    counts = [int(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: samples - sum(counts)]:
        counts[index] += 1
    return counts


def draw_mix(
    tokenizer: PreTrainedTokenizerBase,
    mix: Sequence[Documents],
    *,
    samples: int,
    length: int,
    seed: int,
    vocab_size: int | None = None,
    store: TokenStore | None = None,
) -> Tensor:
    """Draw windows from documents of one or several sources, by their shares, in an order drawn from the seed.

    The order is drawn, not alternating: every fourth calibration window is held out, and is to be of any source.

    Args:
        tokenizer: the model's tokenizer.
        mix: the documents of each source. Those of a single source are in the order in which they were drawn.
        samples: windows to draw.
        length: tokens per window.
        seed: seed of the positions and of the order.
        vocab_size: size of the model's vocabulary, to check the tokens against.
        store: where tokens are kept; None for nowhere.

    Returns:
        [samples, length], int64.

    Raises:
        DataError: too little text, or a tokenizer that does not fit the model.
    """
    drawn = []
    for index, (part, count) in enumerate(zip(mix, apportion(samples, [part.share for part in mix]), strict=True)):
        if not count:
            continue
        with naming(part.key):
            drawn.append(
                draw_windows(
                    tokenizer,
                    part.texts,
                    part.separator,
                    samples=count,
                    length=length,
                    # Two entries of one text are not to draw the same windows.
                    seed=seed + index,
                    vocab_size=vocab_size,
                    store=store,
                )
            )
    if len(mix) == 1:
        return drawn[0]
    order = random.Random(seed).sample(range(samples), samples)
    return torch.cat(drawn)[order]
