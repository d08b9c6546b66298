"""Tokenise long text in chunks, with the same result: a tokenizer needs 150 times the memory of its input."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
"""Fewest tokens of the overlap that both chunks must have where they are joined."""

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


def encode_in_chunks(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool, offsets: bool = True
) -> Tokens:
    """Tokenise a text in chunks, with the same result as in one call.

    Chunks overlap, and what two of them share is tokenised once more by itself: it ends where the one chunk ends, and
    begins where the other begins. They are joined inside it, where it has the tokens of both for some length: tokens so
    far from the end of a text do not depend on what follows. If they do not agree, the whole text is tokenised in one
    call. Some chunks at a time are tokenised side by side, one on each processor.

    Args:
        tokenizer: a fast tokenizer.
        text: text of any length.
        add_special_tokens: add the tokenizer's special tokens at the ends of the text.
        offsets: return them; without them it is faster.

    Raises:
        DataError: the tokenizer fails.
    """

    def encode(parts: list[str]) -> Sequence[Encoding]:
        return _encode(tokenizer, parts, add_special_tokens, offsets)

    starts, together = range(0, max(len(text), 1), CHUNK), min(os.cpu_count() or 1, TOGETHER)
    chunks: list[Tokens] = []
    for group in (starts[first : first + together] for first in range(0, len(starts), together)):
        places = [max(0, start - OVERLAP) for start in group]
        pairs = [(text[place : start + CHUNK], text[place:start]) for place, start in zip(places, group, strict=True)]
        encodings = encode([part for pair in pairs for part in pair])
        for start, place, encoding, shared in zip(group, places, encodings[::2], encodings[1::2], strict=True):
            chunk = _tokens(encoding, place, inner_start=start > 0, inner_end=start < starts[-1], offsets=offsets)
            if chunks:
                overlap = _tokens(shared, place, inner_start=True, inner_end=True, offsets=False)
                left, seam = chunks[-1], _seam(chunks[-1].ids, overlap.ids, chunk.ids)
                if seam is None:
                    log.info("chunks of the text give different tokens; tokenising the whole text in one call")
                    return _tokens(encode([text])[0], 0, inner_start=False, inner_end=False, offsets=offsets)
                kept, skipped = seam
                chunks[-1] = Tokens(left.ids[:kept], left.offsets[:kept])
                chunk = Tokens(chunk.ids[skipped:], chunk.offsets[skipped:])
            chunks.append(chunk)
    return Tokens(np.concatenate([chunk.ids for chunk in chunks]), np.concatenate([chunk.offsets for chunk in chunks]))


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
    with _failing_clearly():
        return tokenizer(text, verbose=False, **options)


@contextmanager
def _failing_clearly() -> Iterator[None]:
    """Raise ``DataError`` if the tokenizer fails."""
    try:
        yield
    except BaseException as error:
        # tokenizers can raise anything, panics included, on a damaged tokenizer.json.
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise DataError(
            f"the tokenizer fails ({type(error).__name__}: {error}); download the model's tokenizer again"
        ) from error


def _encode(tokenizer: Any, parts: list[str], add_special_tokens: bool, offsets: bool) -> Sequence[Encoding]:
    """Tokenise some parts of a text, as a call of the tokenizer does, without copying the tokens into lists."""
    backend = tokenizer.backend_tokenizer
    with _failing_clearly():
        # A tokenizer's file may set them; transformers, too, resets them in every call.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        encode = backend.encode_batch if offsets else backend.encode_batch_fast
        encodings: Sequence[Encoding] = encode(parts, add_special_tokens=add_special_tokens)
    return encodings


def _tokens(encoding: Encoding, place: int, *, inner_start: bool, inner_end: bool, offsets: bool) -> Tokens:
    """Return the tokens of a part of the text, without the special tokens at ends that are not ends of the text.

    Args:
        encoding: what the tokenizer gave.
        place: first character of the part.
        inner_start: the part does not begin where the text does.
        inner_end: the part does not end where the text does.
        offsets: return them.
    """
    special = encoding.special_tokens_mask
    first, end = 0, len(special)
    while inner_start and first < end and special[first]:
        first += 1
    while inner_end and end > first and special[end - 1]:
        end -= 1
    ids = np.asarray(encoding.ids[first:end], dtype=np.int64)
    if not offsets:
        return Tokens(ids, _NONE)
    return Tokens(ids, np.asarray(encoding.offsets[first:end], dtype=np.int64).reshape(-1, 2) + place)


def _seam(left: Ints, overlap: Ints, right: Ints) -> tuple[int, int] | None:
    """Find where two chunks agree with what they share, and so with each other.

    Args:
        left: the tokens of a chunk, which ends with the overlap.
        overlap: those of the overlap.
        right: those of the next chunk, which begins with it.

    Returns:
        The number of tokens to keep of the left chunk, and to skip of the right one: as many as are before the middle
        of what agrees. None if they agree too little.
    """
    first, end = len(overlap) - _count_equal(left[::-1], overlap[::-1]), _count_equal(right, overlap)
    if end - first < MIN_AGREEMENT:
        return None
    middle = (first + end) // 2
    return len(left) - (len(overlap) - middle), middle


def _count_equal(one: Ints, other: Ints) -> int:
    """Count the tokens at the beginning that are the same."""
    length = min(len(one), len(other))
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if len(different) else length
