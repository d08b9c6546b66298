"""Runs of one recipe, executed in several ways, and whether two of them come to the same."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama, write_recipe

from flapkit.checkpoint.bundled import bundled_models
from flapkit.checkpoint.load import open_weights
from flapkit.recipe.load import load_recipe
from flapkit.run.pipeline import run

TEXT = "".join(f"def f{n}(model):\n    return model * {n}\n" for n in range(80))

CALIBRATION = {"dataset": "text.txt", "samples": 12, "length": 16, "batch_size": 5}
CHANGES = {
    "model": {"path": "dense"},
    "calibration": CALIBRATION,
    "budget": {"ratio": 0.3},
    "evaluate": {
        "perplexity": [
            {"dataset": "text.txt", "length": 16, "windows": 9},
            {"dataset": "text.txt", "length": 12, "stride": 5, "windows": 7},
        ]
    },
}
"""What these runs have other than the small recipe."""


def save_dense(folder, **options):
    """A LLaMA with the bundled model's tokenizer, in several files."""
    model = make_llama(vocab_size=4096, **options)
    model.save_pretrained(folder, max_shard_size="50KB")
    add_tokenizer(folder)


def add_tokenizer(folder):
    """Put the bundled model's tokenizer beside another model of its vocabulary."""
    for file in bundled_models()["tiny-llama"].glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())


def load_changed(home, output, **changes):
    """Load the recipe with some more changes."""
    return load_recipe(write_recipe(home, f"{output}.yaml", **{**CHANGES, "output": output, **changes}))


def prune(home, output, **changes):
    """Run the recipe with some more changes."""
    return run(load_changed(home, output, **changes))


def assert_same(whole, other, tolerance=1e-6):
    """Compare two runs: plans, weights, perplexities, and the errors of the sites."""
    for name in ("plan.json", "config.json", "generation_config.json"):
        assert (other.output / name).read_bytes() == (whole.output / name).read_bytes()
    expected, found = open_weights(whole.output), open_weights(other.output)
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=tolerance)
    assert other.params == whole.params
    for name, figures in whole.perplexity.items():
        assert other.perplexity[name]["dense"] == pytest.approx(figures["dense"], rel=1e-5)
        assert other.perplexity[name]["pruned"] == pytest.approx(figures["pruned"], rel=1e-5)
    for name, error in whole.errors.items():
        assert other.errors[name].alone == pytest.approx(error.alone, rel=1e-3)
        assert other.errors[name].in_model == (error.in_model and pytest.approx(error.in_model, rel=1e-3))
        assert other.errors[name].predicted == (error.predicted and pytest.approx(error.predicted, rel=1e-3))
