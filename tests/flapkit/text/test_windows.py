from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flapkit.system.errors import DataError
from flapkit.text.windows import (
    UNSCORED,
    Windows,
    check_vocabulary,
    cut_windows,
    draw_windows,
    encode,
    sample_documents,
    sample_windows,
    tokens_hash,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and one for "ab"; the start token begins every text, and four tokens are a context."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", *alphabet, "ab"])}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", model_max_length=4)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(text))


def test_text_is_tokenised_in_one_piece(tokenizer: PreTrainedTokenizerFast) -> None:
    joint = tokenizer.convert_tokens_to_ids("ab")
    assert encode(tokenizer, ["xa", "bx"], "").tolist() == [0, *ids(tokenizer, "x"), joint, *ids(tokenizer, "x")]
    assert encode(tokenizer, ["xa", "bx"], "-").tolist() == [0, *ids(tokenizer, "xa-bx")]
    assert encode(tokenizer, ["x"], "-").dtype == torch.long


def test_rendered_conversations_start_themselves(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode(tokenizer, ["<s>x", "<s>y"], "-").tolist() == [0, *ids(tokenizer, "x"), 0, *ids(tokenizer, "y")]


def test_a_text_longer_than_the_context_is_no_warning(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(encode(tokenizer, ["x" * 100], "")) == 101
    assert not caplog.records


def test_a_tokenizer_of_another_model(tokenizer: PreTrainedTokenizerFast) -> None:
    largest = int(encode(tokenizer, ["ab"], "").max())
    encode(tokenizer, ["ab"], "", vocab_size=largest + 1)
    check_vocabulary(torch.tensor([], dtype=torch.long), 1)
    problem = f"does not fit the model: it gives token {largest}, but the model's vocabulary is 0 to {largest - 1}"
    with pytest.raises(DataError, match=problem):
        encode(tokenizer, ["ab"], "", vocab_size=largest)
    for separator in ("", None):
        with pytest.raises(DataError, match=problem):
            draw_windows(tokenizer, ["ab" * 9], separator, samples=1, length=2, seed=0, vocab_size=largest)
    with pytest.raises(DataError, match="gives token -1"):
        check_vocabulary(torch.tensor([-1, 1]), 3)


def test_windows_are_drawn_as_the_released_code_draws_them() -> None:
    tokens = torch.arange(1000)
    random.seed(3)
    starts = [random.randint(0, 1000 - 16 - 1) for _ in range(50)]  # its lib/data.py: seeds, then draws
    drawn = sample_windows(tokens, samples=50, length=16, seed=3)
    assert drawn.dtype == torch.long
    assert drawn.tolist() == [list(range(start, start + 16)) for start in starts]
    assert not torch.equal(drawn, sample_windows(tokens, samples=50, length=16, seed=4))


def test_drawing_leaves_pythons_generator_alone() -> None:
    random.seed(0)
    before = random.getstate()
    sample_windows(torch.arange(100), samples=5, length=10, seed=1)
    assert random.getstate() == before


def test_too_little_text_says_how_much() -> None:
    with pytest.raises(DataError, match="calibration: the text has 8 tokens, but 9 are needed for windows of 8"):
        sample_windows(torch.arange(8), samples=1, length=8, seed=0)
    assert sample_windows(torch.arange(9), samples=2, length=8, seed=0).tolist() == [list(range(8))] * 2
    with pytest.raises(DataError, match="evaluation: the text has 7 tokens, but 8 are needed"):
        cut_windows(torch.arange(7), 8)
    with pytest.raises(DataError, match="evaluation: the text has 7 tokens, but 8 are needed"):
        cut_windows(torch.arange(7), 8, stride=4)


def test_windows_within_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = ["x" * 30, "short", "y" * 40, "z"]
    drawn = sample_documents(tokenizer, documents, samples=40, length=8, seed=0)
    assert drawn.shape == (40, 8)
    x, y = ids(tokenizer, "x")[0], ids(tokenizer, "y")[0]
    kinds = {frozenset(row) - {0} for row in drawn.tolist()}
    assert kinds == {frozenset({x}), frozenset({y})}
    assert torch.equal(drawn, draw_windows(tokenizer, documents, None, samples=40, length=8, seed=0))


def test_windows_within_documents_are_the_released_codes(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = ["".join(chr(97 + (n + k) % 26) for k in range(4 + 7 * n)) for n in range(6)]
    random.seed(5)
    expected = []
    for _ in range(20):  # its lib/data.py, get_c4
        while True:
            tokens = encode(tokenizer, [documents[random.randint(0, len(documents) - 1)]], "")
            if len(tokens) > 10:
                break
        start = random.randint(0, len(tokens) - 10 - 1)
        expected.append(tokens[start : start + 10].tolist())
    assert sample_documents(tokenizer, documents, samples=20, length=10, seed=5).tolist() == expected


def test_no_document_is_long_enough(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="the longest document has 6 tokens, but 9 are needed"):
        sample_documents(tokenizer, ["short", "x"], samples=1, length=8, seed=0)


def test_drawing_from_joined_text(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = ["one two", "three four five"]
    expected = sample_windows(encode(tokenizer, documents, " "), samples=3, length=5, seed=1)
    assert torch.equal(draw_windows(tokenizer, documents, " ", samples=3, length=5, seed=1), expected)


def test_windows_that_do_not_overlap() -> None:
    windows = cut_windows(torch.arange(11), 4)
    assert windows.input_ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows.attention_mask.tolist() == [[1] * 4] * 2
    assert windows.labels.tolist() == [[UNSCORED, 1, 2, 3], [UNSCORED, 5, 6, 7]]
    assert len(windows) == 2
    assert len(cut_windows(torch.arange(11), 4, limit=1)) == 1


def test_overlapping_windows_by_hand() -> None:
    windows = cut_windows(torch.arange(10, 19), 4, stride=2)
    assert windows.input_ids.tolist() == [[10, 11, 12, 13], [12, 13, 14, 15], [14, 15, 16, 17], [16, 17, 18, 0]]
    assert windows.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
    no = UNSCORED
    assert windows.labels.tolist() == [[no, 11, 12, 13], [no, no, 14, 15], [no, no, 16, 17], [no, no, 18, no]]
    assert cut_windows(torch.arange(10, 19), 4, stride=2, limit=2).labels.tolist() == windows.labels[:2].tolist()


def scored(windows: Windows) -> list[int]:
    """The tokens that are scored; a label at a window's first place would have nothing to be predicted from."""
    assert (windows.labels[:, 0] == UNSCORED).all()
    held = windows.labels != UNSCORED
    assert (windows.attention_mask[held] == 1).all()
    assert torch.equal(windows.labels[held], windows.input_ids[held])
    return windows.labels[held].tolist()


@given(count=st.integers(2, 60), length=st.integers(2, 12), stride=st.integers(1, 12))
def test_each_token_is_scored_once(count: int, length: int, stride: int) -> None:
    if count < length or stride > length:
        return
    windows = cut_windows(torch.arange(100, 100 + count), length, stride=stride)
    everything = range(101, 100 + count)
    unpredictable = range(100 + length, 100 + count, length) if stride == length else ()
    assert scored(windows) == [token for token in everything if token not in unpredictable]
    assert windows.attention_mask[:-1].all()
    assert windows.attention_mask[-1].any()
    assert windows.input_ids.shape == windows.labels.shape == windows.attention_mask.shape == (len(windows), length)


@pytest.mark.parametrize("options", [{"length": 1}, {"stride": 0}, {"stride": 5}, {"limit": 0}])
def test_windows_that_cannot_be_cut(options: dict[str, int]) -> None:
    with pytest.raises(DataError, match="is out of range"):
        cut_windows(torch.arange(20), **{"length": 4, **options})


def test_the_cut_text_is_left_alone() -> None:
    tokens = torch.arange(10)
    for stride in (None, 3):
        windows = cut_windows(tokens, 4, stride=stride)
        windows.labels.zero_()
        assert tokens.tolist() == list(range(10))
        assert windows.input_ids[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("other", [torch.arange(6).view(3, 2), torch.arange(1, 7).view(2, 3), torch.arange(6)])
def test_the_hash_tells_values_and_shapes_apart(other: Tensor) -> None:
    tokens = torch.arange(6).view(2, 3)
    assert tokens_hash(tokens) != tokens_hash(other)


def test_the_hash_is_of_values_not_of_storage() -> None:
    tokens = torch.arange(6).view(2, 3)
    assert tokens_hash(tokens) == tokens_hash(tokens.int()) == tokens_hash(tokens.t().contiguous().t())
    assert len(tokens_hash(tokens)) == 64
    # Stands in saved checkpoints: it must never change.
    assert tokens_hash(torch.tensor([[1, 2]])).startswith("bcd15eedd16e3885")
