"""Chunks of a text give the tokens, and their offsets, of the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from flapkit.checkpoint.load import load_tokenizer
from flapkit.text import tokenise as pieces

WORDS = ["def", " x", "(", "\n\n", "größer ", "日本語", "🙂", "\t", "aaaaaaaa", " = 1", "<s>", "é", "e\u0301", " "]


def sentencepiece() -> PreTrainedTokenizerFast:
    """As LLaMA's: no words, a space before the text, the start and the end token at its ends."""
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    made.train_from_iterator(["def f(x):\n    return x = 1\n größer 日本語 aaaa aaaa"] * 20, trainer)
    specials = [("<s>", 1), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["byte level", "sentencepiece"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return load_tokenizer("builtin:tiny-llama") if request.param == "byte level" else sentencepiece()


@pytest.fixture
def short(monkeypatch):
    for name, value in (("CHUNK", 128), ("OVERLAP", 64), ("MIN_AGREEMENT", 8)):
        monkeypatch.setattr(pieces, name, value)


def whole(tokenizer, text, special):
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return np.array(found["input_ids"]), np.array(found["offset_mapping"]).reshape(-1, 2)


@pytest.mark.parametrize("special", [True, False])
def test_pieces_are_the_whole(tokenizer, short, special):
    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.sampled_from(WORDS), max_size=400).map("".join))
    def check(text):
        found = pieces.encode_in_chunks(tokenizer, text, add_special_tokens=special)
        ids, places = whole(tokenizer, text, special)
        assert np.array_equal(found.ids, ids)
        added = ids <= 2 if special else np.zeros(len(ids), dtype=bool)
        assert np.array_equal(found.offsets[~added], places[~added])

        bare = pieces.encode_in_chunks(tokenizer, text, add_special_tokens=special, offsets=False)
        assert np.array_equal(bare.ids, ids)
        assert len(bare.offsets) == 0

    check()


def test_a_long_text_is_cut(tokenizer, short, monkeypatch):
    lengths = []
    encode = pieces._encode
    monkeypatch.setattr(pieces, "_encode", lambda *asked: lengths.extend(map(len, asked[1])) or encode(*asked))
    text = "".join(f"{n} x, {n * n} y\n" for n in range(200))
    found = pieces.encode_in_chunks(tokenizer, text, add_special_tokens=True)
    assert np.array_equal(found.ids, whole(tokenizer, text, True)[0])
    assert max(lengths) <= 192
    # Each chunk but the first with what it shares with the one before.
    assert sum(length > 64 for length in lengths) == -(-len(text) // 128)


def test_pieces_that_never_agree(short, caplog):
    """Where each piece counts its pairs from its own beginning, only the whole is right."""
    made = Tokenizer(models.BPE({"a": 0, "aa": 1, "b": 2}, [("a", "a")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    caplog.set_level("INFO", "flapkit")
    text = "b" + "a" * 1000
    found = pieces.encode_in_chunks(tokenizer, text, add_special_tokens=False)
    assert found.ids.tolist() == tokenizer(text)["input_ids"]
    assert "in one call" in caplog.text
