"""Samples: the likeliest text, or a drawn one that the seed decides."""

from __future__ import annotations

import pytest
import torch

import flapkit
from flapkit.checkpoint.load import load_tokenizer
from flapkit.evaluation.samples import write_samples

PROMPTS = ["def load(path):", "import os\n"]


@pytest.fixture(scope="module")
def tiny():
    return flapkit.load("builtin:tiny-llama", "float32"), load_tokenizer("builtin:tiny-llama")


def test_greedy_text_is_the_likeliest(tiny):
    model, tokenizer = tiny
    (written, _) = write_samples(model, tokenizer, PROMPTS, tokens=6)
    tokens = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(dim=-1)], dim=1)
    whole = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert whole.endswith(written)
    assert written


def test_a_seed_decides_what_is_drawn(tiny):
    drawn = [list(write_samples(*tiny, PROMPTS[:1], 12, temperature=1.0, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_callers_generator_is_untouched(tiny):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    list(write_samples(*tiny, PROMPTS, 2, temperature=0.7))
    assert torch.equal(before, torch.random.get_rng_state())
