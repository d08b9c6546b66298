"""Windows of tokens: drawn at random for calibration, cut in order for evaluation."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flapkit.system.errors import DataError
from flapkit.system.sizes import counted
from flapkit.text.tokenise import CHUNK, Ints, encode_in_chunks, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNSCORED = -100
"""The label of a token that is not scored."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows to evaluate.

    Args:
        input_ids: [windows, length], int64.
        attention_mask: [windows, length], int64: 0 for the padding of a shorter last window, else 1.
        labels: [windows, length], int64: the token if it is scored, else -100.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


class TokenStore(Protocol):
    """Keeps the tokens of texts, so that no text is tokenised twice."""

    def find(self, key: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Return the tensors that are kept under a key, or make and keep them.

        Args:
            key: hash of everything that the tensors depend on.
            make: makes the tensors.
        """


def encode(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    separator: str,
    vocab_size: int | None = None,
    store: TokenStore | None = None,
) -> Tensor:
    """Join documents and tokenise them, with the tokenizer's special tokens at the ends of the whole text.

    Documents are joined first, as in FLAP's released code, since tokens may span a separator. Conversations that start
    with the tokenizer's BOS token are complete, and are joined without a separator.

    Args:
        tokenizer: the model's tokenizer.
        documents: at least one document.
        separator: text between documents.
        vocab_size: size of the model's vocabulary, to check the tokens against.
        store: where tokens are kept; None for nowhere.

    Returns:
        [tokens], int64.

    Raises:
        DataError: the tokenizer does not fit the model.
    """
    return encode_measured(tokenizer, documents, separator, vocab_size, measure=False, store=store).tokens


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text as tokens.

    Args:
        tokens: [tokens], int64.
        sizes: UTF-8 bytes of text for each token, int64 [tokens]; their sum is that of the text. None if the tokenizer
            gives no offsets.
    """

    tokens: Tensor
    sizes: Tensor | None


def encode_measured(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    separator: str,
    vocab_size: int | None = None,
    *,
    measure: bool = True,
    store: TokenStore | None = None,
) -> Encoded:
    """Like ``encode``, and compute the bytes of text for each token.

    Args:
        tokenizer: the model's tokenizer.
        documents: at least one document.
        separator: text between documents.
        vocab_size: size of the model's vocabulary, to check the tokens against.
        measure: False to skip the sizes.
        store: where tokens are kept; None for nowhere.

    Raises:
        DataError: the tokenizer does not fit the model.
    """
    start = tokenizer.bos_token
    complete = bool(start) and all(document.startswith(start) for document in documents)
    text = ("" if complete else separator).join(documents)
    if not tokenizer.is_fast:
        tokens, sizes = torch.tensor(tokenise(tokenizer, text, add_special_tokens=not complete)["input_ids"]), None
    else:

        def make() -> dict[str, Tensor]:
            ids, offsets = encode_in_chunks(tokenizer, text, add_special_tokens=not complete, offsets=measure)
            measured = {"sizes": _sizes(text, offsets).int()} if measure else {}
            return {"tokens": torch.from_numpy(ids).int(), **measured}

        # A short text is tokenised sooner than it is found.
        if store is None or len(text) < CHUNK:
            kept: Mapping[str, Tensor] = make()
        else:
            kept = store.find(_key(tokenizer, text, not complete, measure), make)
        tokens, sizes = kept["tokens"].long(), kept["sizes"].long() if measure else None
    if vocab_size is not None:
        check_vocabulary(tokens, vocab_size)
    return Encoded(tokens, sizes)


def _key(tokenizer: Any, text: str, add_special_tokens: bool, measure: bool) -> str:
    """Hash everything that the tokens of a text depend on."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    parts = (type(tokenizer).__qualname__, tokenizer.backend_tokenizer.to_str(), add_special_tokens, measure)
    versions = [version(package) for package in ("tokenizers", "transformers")]
    digest.update(json.dumps([*parts, *versions]).encode())
    return digest.hexdigest()


def _sizes(text: str, offsets: Ints) -> Tensor:
    """Distribute a text's bytes over its tokens: each gets the bytes from the end of the previous token to its own end.

    Skipped text counts for the next token, and a character split over several tokens counts for the first.
    """
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    widths = 1 + (characters > 0x7F) + (characters > 0x7FF) + (characters > 0xFFFF)
    ends = np.maximum.accumulate(offsets[:, 1])
    return torch.from_numpy(np.diff(np.concatenate([[0], np.cumsum(widths)])[ends], prepend=0).astype(np.int64))


def check_vocabulary(tokens: Tensor, vocab_size: int) -> None:
    """Raise ``DataError`` if a token is outside the model's vocabulary: the tokenizer belongs to another model.

    Args:
        tokens: of any shape.
        vocab_size: size of the model's vocabulary.
    """
    if tokens.numel() == 0:
        return
    largest = int(tokens.max())
    if largest >= vocab_size or int(tokens.min()) < 0:
        token = largest if largest >= vocab_size else int(tokens.min())
        raise DataError(
            f"the tokenizer does not fit the model: it gives token {token}, but the model's vocabulary is "
            f"0 to {vocab_size - 1}; use the tokenizer that the model was trained with"
        )


def sample_windows(tokens: Tensor, samples: int, length: int, seed: int) -> Tensor:
    """Draw windows at random positions, as FLAP's released code does.

    Args:
        tokens: [tokens], int64.
        samples: windows to draw; they may overlap.
        length: tokens per window.
        seed: seed of Python's generator.

    Returns:
        [samples, length], int64.

    Raises:
        DataError: the text is no longer than a window.
    """
    if len(tokens) <= length:
        raise _too_little("calibration", len(tokens), length + 1, length)
    draw = random.Random(seed)
    starts = torch.tensor([draw.randint(0, len(tokens) - length - 1) for _ in range(samples)])
    windows: Tensor = tokens.unfold(0, length, 1)[starts]
    return windows


def sample_documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], samples: int, length: int, seed: int
) -> Tensor:
    """Draw windows within single documents, as FLAP's released code does from C4.

    Documents are drawn until one is longer than a window, then a position in it; only drawn documents are tokenised.

    Args:
        tokenizer: the model's tokenizer.
        documents: at least one document.
        samples: windows to draw.
        length: tokens per window.
        seed: seed of Python's generator.

    Returns:
        [samples, length], int64.

    Raises:
        DataError: no document is longer than a window.
    """
    draw = random.Random(seed)
    too_short: dict[int, int] = {}
    windows: list[Tensor] = []
    while len(windows) < samples:
        if len(too_short) == len(documents):
            raise _too_little("calibration", max(too_short.values(), default=0), length + 1, length, "longest document")
        index = draw.randint(0, len(documents) - 1)
        if index in too_short:
            continue
        tokens = encode(tokenizer, [documents[index]], "")
        if len(tokens) <= length:
            too_short[index] = len(tokens)
            continue
        start = draw.randint(0, len(tokens) - length - 1)
        windows.append(tokens[start : start + length])
    return torch.stack(windows)


def draw_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    separator: str | None,
    *,
    samples: int,
    length: int,
    seed: int,
    vocab_size: int | None = None,
    store: TokenStore | None = None,
) -> Tensor:
    """Draw calibration windows from documents.

    Args:
        tokenizer: the model's tokenizer.
        documents: at least one document.
        separator: text between documents; None to draw each window within one document.
        samples: windows to draw.
        length: tokens per window.
        seed: seed of Python's generator.
        vocab_size: size of the model's vocabulary, to check the tokens against.
        store: where tokens are kept; None for nowhere.

    Returns:
        [samples, length], int64.

    Raises:
        DataError: too little text, or a tokenizer that does not fit the model.
    """
    if separator is None:
        windows = sample_documents(tokenizer, documents, samples, length, seed)
        if vocab_size is not None:
            check_vocabulary(windows, vocab_size)
        return windows
    return sample_windows(encode(tokenizer, documents, separator, vocab_size, store), samples, length, seed)


def cut_windows(tokens: Tensor, length: int, stride: int | None = None, limit: int | None = None) -> Windows:
    """Cut a text into windows to evaluate.

    Without a stride, windows do not overlap, all tokens but the first of each window are scored, and an incomplete last
    window is dropped: the protocol of FLAP's released code. With a stride, every token but the text's first is scored
    once, with the earlier tokens of its window as context, and the last window ends with the text. If the stride is a
    whole window, there is no overlap, and the first token of each window is not scored.

    Args:
        tokens: [tokens], int64.
        length: tokens per window, at least 2.
        stride: tokens from the start of one window to the next, from 1 to ``length``.
        limit: maximum number of windows, from the beginning of the text.

    Raises:
        DataError: the text is shorter than a window, or the length, stride or limit is out of range.
    """
    if length < 2 or (stride is not None and not 1 <= stride <= length) or (limit is not None and limit < 1):
        raise DataError(
            f"evaluation: length {length}, stride {stride} or limit {limit} is out of range; "
            "the length is at least 2, the stride from 1 to the length, the limit at least 1"
        )
    if len(tokens) < length:
        raise _too_little("evaluation", len(tokens), length, length)
    if stride is None:
        inputs = tokens[: len(tokens) // length * length].view(-1, length)[:limit]
        return Windows(inputs, torch.ones_like(inputs), _unscored(inputs, 1))
    return _strided(tokens, length, stride, limit)


def _strided(tokens: Tensor, length: int, stride: int, limit: int | None) -> Windows:
    # The last window is the first that reaches the end of the text.
    reach = 1 + -(-(len(tokens) - length) // stride)
    count = min(reach, limit or reach)
    padding = max(0, (count - 1) * stride + length - len(tokens))
    padded = torch.cat([tokens, tokens.new_zeros(padding)])
    inputs = padded.unfold(0, length, stride)[:count].contiguous()
    mask = torch.ones_like(inputs)
    # Later windows score only tokens that are not in the previous window.
    labels = _unscored(inputs, max(1, length - stride))
    labels[0] = _unscored(inputs[:1], 1)[0]
    if padding:
        mask[-1, -padding:] = 0
        labels[-1, -padding:] = UNSCORED
    return Windows(inputs, mask, labels)


def _unscored(inputs: Tensor, context: int) -> Tensor:
    labels = inputs.clone()
    labels[:, :context] = UNSCORED
    return labels


def _too_little(purpose: str, tokens: int, needed: int, length: int, what: str = "text") -> DataError:
    return DataError(
        f"{purpose}: the {what} has {counted(tokens, 'token')}, but {needed:,} are needed for windows of {length}; "
        "use more text or a smaller length"
    )


def tokens_hash(tokens: Tensor) -> str:
    """Return the SHA-256 of the shape and the values of tokens, as hexadecimal digits."""
    content = tokens.detach().to("cpu", torch.int64).contiguous().numpy().astype("<i8", copy=False)
    digest = hashlib.sha256(repr(tuple(content.shape)).encode())
    # In place: millions of windows are gigabytes.
    digest.update(content.data)
    return digest.hexdigest()
