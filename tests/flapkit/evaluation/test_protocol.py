from __future__ import annotations

import math

import pytest
import torch

from flapkit.checkpoint.load import load_tokenizer
from flapkit.evaluation.perplexity import PerplexityValues
from flapkit.evaluation.protocol import bits_per_byte, cut_text, perplexity
from flapkit.text.windows import UNSCORED, Encoded, encode, encode_measured

TEXTS = ["def f(x):\n    return x\n", "größer ≠ 日本語 🙂🙂 naïve", "", "\tif x:\n\n\n  pass"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:tiny-llama")


def values(over_windows: float, over_tokens: float, nll: float) -> PerplexityValues:
    return PerplexityValues(*(torch.tensor(value, dtype=torch.float64) for value in (over_windows, over_tokens, nll)))


def test_the_sizes_add_up_to_the_text(tokenizer) -> None:
    for count in (1, 2, 4):
        text = "\n\n".join(TEXTS[:count])
        encoded = encode_measured(tokenizer, TEXTS[:count], "\n\n")
        assert encoded.sizes is not None
        assert int(encoded.sizes.sum()) == len(text.encode())
        assert int(encoded.sizes.min()) >= 0
        assert torch.equal(encoded.tokens, encode(tokenizer, TEXTS[:count], "\n\n"))


def test_a_token_has_the_bytes_that_it_spells(tokenizer) -> None:
    encoded = encode_measured(tokenizer, ["return x + 1"], "")
    spelt = [len(tokenizer.decode([token]).encode()) for token in encoded.tokens.tolist()]
    assert encoded.sizes is not None
    assert encoded.sizes.tolist() == spelt


@pytest.mark.parametrize(("stride", "limit"), [(None, None), (None, 2), (3, None), (5, 4), (1, None)])
def test_the_bytes_are_those_of_the_scored_tokens(stride: int | None, limit: int | None) -> None:
    tokens = torch.arange(43)
    windows, protocol = cut_text(Encoded(tokens, tokens + 100), 8, stride, limit)
    scored = windows.labels[windows.labels != UNSCORED]
    assert protocol.tokens == len(scored)
    # Each token's size is 100 more than the token itself.
    assert protocol.bytes == int(scored.sum()) + 100 * len(scored)
    assert protocol.windows == len(windows)
    assert protocol.mean == ("windows" if stride is None else "tokens")


def test_the_start_token_is_noted() -> None:
    text = Encoded(torch.tensor([1, 5, 6, 7]), None)
    assert cut_text(text, 2, bos=1)[1].bos
    assert not cut_text(text, 2, bos=5)[1].bos
    assert not cut_text(text, 2)[1].bos


def test_other_windows_have_another_hash() -> None:
    text = Encoded(torch.arange(20), None)
    hashes = {cut_text(text, *cut)[1].tokens_sha256 for cut in ((4,), (5,), (4, 2), (4, None, 2))}
    assert len(hashes) == 4


def test_the_protocol_names_the_mean() -> None:
    text = Encoded(torch.arange(20), None)
    assert perplexity(values(2, 3, 1), cut_text(text, 4)[1]) == 2
    assert perplexity(values(2, 3, 1), cut_text(text, 4, 2)[1]) == 3


def test_bits_per_byte_by_hand() -> None:
    protocol = cut_text(Encoded(torch.arange(8), torch.full((8,), 5)), 4)[1]
    assert protocol.bytes == 30
    assert bits_per_byte(values(1, 1, 60 * math.log(2)), protocol) == pytest.approx(2.0, rel=1e-12)


def test_no_bits_per_byte_where_nobody_knows_the_bytes() -> None:
    assert bits_per_byte(values(1, 1, 1), cut_text(Encoded(torch.arange(8), None), 4)[1]) is None
