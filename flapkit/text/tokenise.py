"""Tokenise a long text in pieces, to the same tokens: a tokenizer takes 150 times the memory of what it is given."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from flapkit.system.errors import DataError, is_panic

PIECE = 2**17
"""Characters of a piece."""

OVERLAP = 2**12
"""Characters that a piece begins before the end of the one before it."""

AGREED = 64
"""Tokens in which two pieces have to agree before the text is cut between them."""

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]


class Tokens(NamedTuple):
    """Tokens and where they stand.

    Args:
        ids: int64 [tokens].
        places: first character, and the one after the last, of each, int64 [tokens, 2].
    """

    ids: Ints
    places: Ints

    def part(self, first: int, end: int | None = None) -> Tokens:
        """Return some of the tokens."""
        return Tokens(self.ids[first:end], self.places[first:end])


def encode_in_chunks(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> Tokens:
    """Tokenise a text as if it were done at once.

    Pieces overlap, and are joined where both have the same tokens at the same places for a while: what stands so far
    from a piece's end does not depend on it. Where two pieces never agree, the text is tokenised at once.

    Args:
        tokenizer: a fast one, which knows where its tokens stand.
        text: of any length.
        add_special_tokens: put the tokenizer's own tokens at the ends of the text.
    """
    starts = range(0, max(len(text), 1), PIECE)
    joined: list[Tokens] = []
    for start in starts:
        first = max(0, start - OVERLAP)
        found = _encode(tokenizer, text[first : start + PIECE], first, add_special_tokens)
        piece = _without_added(found, start > 0, start < starts[-1])
        seam = _seam(joined[-1], piece, start - OVERLAP // 2) if joined else (None, 0)
        if seam is None:
            log.info("the tokenizer does not come to the same tokens in pieces; the text is tokenised at once")
            return _encode(tokenizer, text, 0, add_special_tokens)[0]
        if joined:
            joined[-1] = joined[-1].part(0, seam[0])
        joined.append(piece.part(seam[1]))
    return Tokens(np.concatenate([each.ids for each in joined]), np.concatenate([each.places for each in joined]))


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Any:
    """Call a tokenizer.

    Args:
        tokenizer: the model's.
        text: of any length; that it is longer than the model's context is no surprise.
        options: as transformers takes them.

    Returns:
        What the tokenizer returns.

    Raises:
        DataError: the tokenizer fails.
    """
    try:
        return tokenizer(text, verbose=False, **options)
    except BaseException as error:
        # A tokenizer is what somebody wrote, for a library that can raise anything on what it does not expect.
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        said = f"{type(error).__name__}: {error}"
        raise DataError(f"the tokenizer fails ({said}); fetch the model's tokenizer again") from error


def _encode(tokenizer: Any, text: str, first: int, add_special_tokens: bool) -> tuple[Tokens, Sequence[int]]:
    """Tokenise a piece; return its tokens, and which of them the tokenizer put at the ends."""
    found = tokenise(
        tokenizer,
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
    )
    places = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    return Tokens(np.asarray(found["input_ids"], dtype=np.int64), places + first), found["special_tokens_mask"]


def _without_added(found: tuple[Tokens, Sequence[int]], before: bool, behind: bool) -> Tokens:
    """Leave out what the tokenizer put before, and behind, a piece that does not begin, or end, the text."""
    tokens, added = found
    first, end = 0, len(added)
    while before and first < end and added[first]:
        first += 1
    while behind and end > first and added[end - 1]:
        end -= 1
    return tokens.part(first, end)


def _seam(before: Tokens, behind: Tokens, middle: int) -> tuple[int, int] | None:
    """Find where two pieces agree, from the middle of their overlap on.

    Returns:
        The number of tokens to keep of the piece before, and to leave out of the one behind.
    """
    for mine in range(int(np.searchsorted(before.places[:, 0], middle)), len(before.ids) - AGREED):
        theirs = int(np.searchsorted(behind.places[:, 0], before.places[mine, 0]))
        ours, others = before.part(mine, mine + AGREED), behind.part(theirs, theirs + AGREED)
        if np.array_equal(ours.ids, others.ids) and np.array_equal(ours.places, others.places):
            return mine, theirs
    return None
