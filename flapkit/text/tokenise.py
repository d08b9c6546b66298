"""Tokenise long text in chunks, with the same result: a tokenizer needs 150 times the memory of its input."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flapkit.system.errors import DataError, is_panic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 2**17
"""Characters per chunk."""

OVERLAP = 2**12
"""Characters by which a chunk overlaps the previous one."""

MIN_AGREEMENT = 64
"""Number of consecutive equal tokens in the overlap at which two chunks are joined."""

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]


class Tokens(NamedTuple):
    """Tokens with their positions in the text.

    Args:
        ids: int64 [tokens].
        offsets: start and end of each token in characters, int64 [tokens, 2].
    """

    ids: Ints
    offsets: Ints

    def part(self, first: int, end: int | None = None) -> Tokens:
        """Return a slice of the tokens."""
        return Tokens(self.ids[first:end], self.offsets[first:end])


def encode_in_chunks(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> Tokens:
    """Tokenise a text in chunks, with the same result as in one call.

    Chunks overlap, and are joined where both have the same tokens at the same offsets for some length: tokens so far
    from a chunk's end do not depend on it. If two chunks do not agree, the whole text is tokenised in one call.

    Args:
        tokenizer: a fast tokenizer, which returns offsets.
        text: text of any length.
        add_special_tokens: add the tokenizer's special tokens at the ends of the text.
    """
    starts = range(0, max(len(text), 1), CHUNK)
    joined: list[Tokens] = []
    for start in starts:
        first = max(0, start - OVERLAP)
        encoded = _encode(tokenizer, text[first : start + CHUNK], first, add_special_tokens)
        chunk = _strip_special(encoded, at_start=start > 0, at_end=start < starts[-1])
        seam = _seam(joined[-1], chunk, start - OVERLAP // 2) if joined else (None, 0)
        if seam is None:
            log.info("chunks of the text give different tokens; tokenising the whole text in one call")
            return _encode(tokenizer, text, 0, add_special_tokens)[0]
        if joined:
            joined[-1] = joined[-1].part(0, seam[0])
        joined.append(chunk.part(seam[1]))
    ids, offsets = [chunk.ids for chunk in joined], [chunk.offsets for chunk in joined]
    return Tokens(np.concatenate(ids), np.concatenate(offsets))


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Any:
    """Call a tokenizer.

    Args:
        tokenizer: the model's tokenizer.
        text: text of any length; there is no warning if it exceeds the model's context.
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


def _encode(tokenizer: Any, text: str, first: int, add_special_tokens: bool) -> tuple[Tokens, Sequence[int]]:
    """Tokenise a chunk that starts at character ``first``; return its tokens, and the mask of special tokens."""
    encoded = tokenise(
        tokenizer,
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
    )
    offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return Tokens(np.asarray(encoded["input_ids"], dtype=np.int64), offsets + first), encoded["special_tokens_mask"]


def _strip_special(encoded: tuple[Tokens, Sequence[int]], *, at_start: bool, at_end: bool) -> Tokens:
    """Remove the special tokens at the ends of a chunk that are not ends of the text."""
    tokens, special = encoded
    first, end = 0, len(special)
    while at_start and first < end and special[first]:
        first += 1
    while at_end and end > first and special[end - 1]:
        end -= 1
    return tokens.part(first, end)


def _seam(left: Tokens, right: Tokens, middle: int) -> tuple[int, int] | None:
    """Find where two chunks agree, starting in the middle of their overlap.

    Returns:
        The number of tokens to keep of the left chunk, and to skip of the right one.
    """
    for kept in range(int(np.searchsorted(left.offsets[:, 0], middle)), len(left.ids) - MIN_AGREEMENT):
        skipped = int(np.searchsorted(right.offsets[:, 0], left.offsets[kept, 0]))
        ours, theirs = left.part(kept, kept + MIN_AGREEMENT), right.part(skipped, skipped + MIN_AGREEMENT)
        if np.array_equal(ours.ids, theirs.ids) and np.array_equal(ours.offsets, theirs.offsets):
            return kept, skipped
    return None
