"""Tokenise long text in chunks, with the same result: a tokenizer needs 150 times the memory of its input."""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flapkit.system.errors import DataError, is_panic

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

CHUNK = 2**17
"""Characters per chunk."""

OVERLAP = 2**12
"""Characters by which a chunk overlaps the previous one."""

TOGETHER = 8
"""Most chunks that are tokenised at the same time, on as many processors."""

MIN_AGREEMENT = 64
"""Number of consecutive equal tokens in the overlap at which two chunks are joined."""

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]

_NONE: Ints = np.zeros((0, 2), dtype=np.int64)


class Tokens(NamedTuple):
    """Tokens with their positions in the text.

    Args:
        ids: int64 [tokens].
        offsets: start and end of each token in characters, int64 [tokens, 2]; none where they were not asked for.
    """

    ids: Ints
    offsets: Ints


class _Chunk:
    """The tokens of a part of the text, without the special tokens at ends that are not ends of the text.

    Args:
        encoding: what the tokenizer gave.
        place: first character of the part.
        at_start, at_end: the part does not begin, or end, where the text does.

    Attributes:
        ids: int64 [tokens].
    """

    def __init__(self, encoding: Encoding, place: int, *, at_start: bool, at_end: bool) -> None:
        special = encoding.special_tokens_mask
        first, end = 0, len(special)
        while at_start and first < end and special[first]:
            first += 1
        while at_end and end > first and special[end - 1]:
            end -= 1
        self.ids: Ints = np.asarray(encoding.ids[first:end], dtype=np.int64)
        self._encoding, self._place, self._first = encoding, place, first

    def start(self, token: int) -> int:
        """Return the first character of a token, as the text counts them."""
        return self._span(token)[0]

    def offsets(self, first: int, end: int) -> Ints:
        """Return the positions of some tokens, int64 [tokens, 2]; asked for one by one, as a list of all takes time."""
        return np.asarray([self._span(token) for token in range(first, end)], dtype=np.int64).reshape(-1, 2)

    def all_offsets(self) -> Ints:
        """Return the positions of all tokens, int64 [tokens, 2]."""
        spans = self._encoding.offsets[self._first : self._first + len(self.ids)]
        return np.asarray(spans, dtype=np.int64).reshape(-1, 2) + self._place

    def _span(self, token: int) -> tuple[int, int]:
        first, end = self._encoding.token_to_chars(self._first + token) or (0, 0)
        return self._place + first, self._place + end


def encode_in_chunks(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool, offsets: bool = True
) -> Tokens:
    """Tokenise a text in chunks, with the same result as in one call.

    Chunks overlap, and are joined where both have the same tokens at the same offsets for some length: tokens so far
    from a chunk's end do not depend on it. If two chunks do not agree, the whole text is tokenised in one call. Some
    chunks at a time are tokenised side by side, one on each processor.

    Args:
        tokenizer: a fast tokenizer, which returns offsets.
        text: text of any length.
        add_special_tokens: add the tokenizer's special tokens at the ends of the text.
        offsets: return them; without them it is faster.
    """
    starts, together = range(0, max(len(text), 1), CHUNK), min(os.cpu_count() or 1, TOGETHER)
    ids: list[Ints] = []
    places: list[Ints] = []
    last: _Chunk | None = None
    for group in (starts[first : first + together] for first in range(0, len(starts), together)):
        parts = [text[max(0, start - OVERLAP) : start + CHUNK] for start in group]
        for start, encoding in zip(group, _encode(tokenizer, parts, add_special_tokens), strict=True):
            place = max(0, start - OVERLAP)
            chunk = _Chunk(encoding, place, at_start=start > 0, at_end=start < starts[-1])
            seam = _seam(last, chunk, start - OVERLAP // 2) if last else (0, 0)
            if seam is None:
                log.info("chunks of the text give different tokens; tokenising the whole text in one call")
                chunk = _Chunk(_encode(tokenizer, [text], add_special_tokens)[0], 0, at_start=False, at_end=False)
                return Tokens(chunk.ids, chunk.all_offsets() if offsets else _NONE)
            kept, skipped = seam
            if last:
                dropped = len(last.ids) - kept
                ids[-1] = ids[-1][: len(ids[-1]) - dropped]
                places[-1] = places[-1][: len(places[-1]) - dropped] if offsets else _NONE
            ids.append(chunk.ids[skipped:])
            places.append(chunk.all_offsets()[skipped:] if offsets else _NONE)
            last = chunk
    return Tokens(np.concatenate(ids), np.concatenate(places))


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: Any) -> Any:
    """Call a tokenizer.

    Args:
        tokenizer: the model's tokenizer.
        text: text of any length, or a list of texts; there is no warning if one exceeds the model's context.
        options: passed to the tokenizer.

    Returns:
        The tokenizer's output.

    Raises:
        DataError: the tokenizer fails.
    """
    try:
        return tokenizer(text, verbose=False, **options)
    except BaseException as error:
        # tokenizers can raise anything, panics included, on a damaged tokenizer.json.
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise DataError(
            f"the tokenizer fails ({type(error).__name__}: {error}); download the model's tokenizer again"
        ) from error


def _encode(tokenizer: Any, parts: Sequence[str], add_special_tokens: bool) -> Sequence[Encoding]:
    """Tokenise some parts of a text."""
    encoded = tokenise(
        tokenizer,
        list(parts),
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    encodings: Sequence[Encoding] = encoded.encodings
    return encodings


def _seam(left: _Chunk, right: _Chunk, middle: int) -> tuple[int, int] | None:
    """Find where two chunks agree, starting in the middle of their overlap.

    Returns:
        The number of tokens to keep of the left chunk, and to skip of the right one.
    """
    ours, theirs = range(len(left.ids)), range(len(right.ids))
    for kept in range(bisect_left(ours, middle, key=left.start), len(left.ids) - MIN_AGREEMENT):
        skipped = bisect_left(theirs, left.start(kept), key=right.start)
        ends = kept + MIN_AGREEMENT, min(skipped + MIN_AGREEMENT, len(right.ids))
        if np.array_equal(left.ids[kept : ends[0]], right.ids[skipped : ends[1]]) and np.array_equal(
            left.offsets(kept, ends[0]), right.offsets(skipped, ends[1])
        ):
            return kept, skipped
    return None
