"""How evaluations are named."""

from __future__ import annotations

from flapkit.recipe.schema import Perplexity
from flapkit.run.text import name_evaluations


def test_names_say_what_is_measured():
    texts = [
        Perplexity(dataset="stdlib", split="heldout", length=64),
        Perplexity(dataset="stdlib", length=64, stride=32),
    ]
    assert list(name_evaluations(texts)) == ["stdlib heldout, 64 tokens", "stdlib, 64 tokens, stride 32"]


def test_equal_names_are_numbered():
    texts = [Perplexity(dataset="stdlib", batch_size=size) for size in (1, 2, 3)]
    names = name_evaluations(texts)
    assert list(names) == ["stdlib, 128 tokens", "stdlib, 128 tokens #2", "stdlib, 128 tokens #3"]
    assert [text.batch_size for text in names.values()] == [1, 2, 3]
