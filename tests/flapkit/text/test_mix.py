"""Text of several sources: how many windows each gives, which, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flapkit.checkpoint.load import load_tokenizer
from flapkit.system.errors import DataError
from flapkit.text.mix import Documents, MixedSource, TextMix, apportion, draw_mix
from flapkit.text.source import TextSource
from flapkit.text.windows import draw_windows

SIZES = {"samples": 120, "length": 8, "seed": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:tiny-llama")


def documents(word: str, share: float = 1.0, key: str = "") -> Documents:
    return Documents([" ".join(f"{word}{number}" for number in range(100))] * 3, "\n", share, key)


def rows(windows: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in windows.tolist()]


@given(st.integers(1, 10**6), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6))
def test_windows_are_divided_by_shares(samples, shares):
    counts = apportion(samples, shares)
    assert sum(counts) == samples
    assert all(abs(count - samples * share / sum(shares)) < 1 for count, share in zip(counts, shares, strict=True))


def test_windows_divided_by_hand():
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(8, [0.75, 0.25]) == apportion(8, [3, 1]) == [6, 2]


def test_a_single_source_is_drawn_as_it_always_was(tokenizer):
    text = documents("word")
    expected = draw_windows(tokenizer, text.texts, text.separator, **SIZES)
    assert torch.equal(draw_mix(tokenizer, [text], **SIZES), expected)


def test_each_source_gives_its_share_in_an_order_drawn_from_the_seed(tokenizer):
    mix = [documents("left", 3), documents("right", 1)]
    drawn = rows(draw_mix(tokenizer, mix, **SIZES))
    alone = [
        rows(draw_windows(tokenizer, part.texts, part.separator, samples=count, length=8, seed=3 + index))
        for index, (part, count) in enumerate(zip(mix, (90, 30), strict=True))
    ]
    assert sorted(drawn) == sorted(alone[0] + alone[1])
    assert drawn != alone[0] + alone[1]
    assert rows(draw_mix(tokenizer, mix, **SIZES)) == drawn
    # Both are among the windows that are held out, and among the rest.
    for part in (drawn[3::4], [row for index, row in enumerate(drawn) if index % 4 != 3]):
        assert set(part) & set(alone[0])
        assert set(part) & set(alone[1])


def test_the_same_text_twice_gives_other_windows(tokenizer):
    drawn = rows(draw_mix(tokenizer, [documents("word")] * 2, **SIZES))
    once = rows(draw_mix(tokenizer, [documents("word")], **SIZES | {"samples": 60}))
    assert sorted(drawn) != sorted(once * 2)


def test_what_fails_names_its_entry(tokenizer, tmp_path: Path):
    with pytest.raises(DataError, match=r"^calibration\.mix\.1: calibration: the text has"):
        draw_mix(tokenizer, [documents("word"), Documents(["x"], "", 1.0, "calibration.mix.1")], **SIZES)
    sources = (MixedSource(dataset="stdlib"), MixedSource(dataset=str(tmp_path / "none.txt")))
    mix = TextMix(sources, (1.0, 1.0), ("calibration.mix.0", "calibration.mix.1"))
    with pytest.raises(DataError, match=r"^calibration\.mix\.1: .*none.txt: file or folder not found"):
        mix.check("calibration")
    with pytest.raises(DataError, match=r"^unknown dataset"):
        TextMix.of(TextSource(dataset="stdlb")).check("calibration")


def test_a_title_has_the_shares():
    sources = (MixedSource(dataset="a", share=3), MixedSource(dataset="b"))
    assert TextMix(sources, (3.0, 1.0), ("", "")).title == "a (0.75) + b (0.25)"
    assert TextMix.of(TextSource(dataset="a")).title == "a"
