"""What a recovery is described by: its text, and its distance from a teacher."""

from __future__ import annotations

import pytest
import torch

from flapkit.pruning.recovery import Training, divergence, hold_out
from flapkit.text.mix import TextMix
from flapkit.text.source import TextSource


def test_one_document_in_ten_is_held_out():
    documents = [f"document {index}" for index in range(25)]
    train, held_out = hold_out(documents)
    assert held_out == ["document 9", "document 19"]
    assert sorted([*train, *held_out]) == sorted(documents)


def test_the_end_of_each_of_few_documents_is_held_out():
    train, held_out = hold_out(["a" * 90 + "b" * 10, "c" * 9 + "d"])
    assert train == ["a" * 90, "c" * 9]
    assert held_out == ["b" * 10, "d"]


def test_divergence_is_what_torch_says_of_each_token():
    student, teacher = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    attended = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    p, q = (torch.distributions.Categorical(logits=logits) for logits in (teacher, student))
    by_token = torch.distributions.kl_divergence(p, q)
    counted = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (2, 0)]
    expected = torch.stack([by_token[place] for place in counted]).mean()
    torch.testing.assert_close(divergence(student, teacher, attended), expected)
    assert divergence(teacher, teacher, attended).abs() < 1e-6


def test_the_calibrations_text_is_the_default():
    calibration = TextMix.of(TextSource(dataset="stdlib", split="train"))
    assert Training().source(calibration) == calibration
    own = TextSource(dataset="wikitext2", split="train")
    assert Training(dataset="wikitext2", split="train").source(calibration).sources == (own,)
    assert Training().validation_source() is None
    assert Training(validation=own).validation_source().sources == (own,)


def test_a_split_of_no_dataset():
    with pytest.raises(ValueError, match="need `dataset`"):
        Training(split="train")
