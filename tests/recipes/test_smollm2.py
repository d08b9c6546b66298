"""The recipes of the real model, on a text that every machine has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import flapkit
from flapkit.checkpoint.load import load_tokenizer
from flapkit.model.plan import PruningPlan
from flapkit.recipe.files import find_recipe
from flapkit.recipe.load import load_recipe
from flapkit.run.pipeline import run

pytestmark = pytest.mark.real

TEXT = {
    "calibration": "{dataset: stdlib, split: train, samples: 16, length: 128}",
    "evaluate.perplexity": "[{dataset: stdlib, split: heldout, length: 128, windows: 16}]",
    "evaluate.samples.tokens": "8",
    "report.error_windows": "0",
    "trainer.accelerator": "cpu",
}


def run_on_stdlib(name: str, model: Path, output: Path, **changes: str) -> float:
    """Run a recipe of the real model; return the perplexity of the pruned model over that of the dense one."""
    settings = {**TEXT, "model.path": str(model), "output": str(output), **changes}
    loaded = load_recipe(find_recipe(name), [f"{key}={value}" for key, value in settings.items()])
    record = run(loaded)
    removed = record.params["removed"] / record.params["blocks"]
    assert removed == pytest.approx(loaded.recipe.budget.ratio, abs=0.002)
    (measured,) = record.perplexity.values()
    return measured["pruned"] / measured["dense"]


def test_least_squares_repairs_more_than_the_bias(smollm2, tmp_path):
    flap = run_on_stdlib("smollm2-flap20", smollm2, tmp_path / "flap")
    # A few steps of training: the repair makes the difference.
    best = run_on_stdlib("smollm2-best20", smollm2, tmp_path / "best", **{"searcher.steps": "4"})
    assert 1 < best < flap < 3


def test_a_pruned_model_is_loaded_with_the_same_logits(smollm2, tmp_path):
    """Law 5 at the size of a real model."""
    model, tokenizer = flapkit.load(smollm2), load_tokenizer(smollm2)
    tokens = tokenizer(["The capital of France is Paris, and its river is the Seine."], return_tensors="pt")
    plan = flapkit.prune_(model, tokens["input_ids"], ratio=0.2)
    flapkit.save(model, tmp_path / "pruned", plan, tokenizer=tokenizer)
    with torch.no_grad():
        before, after = (each(**tokens).logits for each in (model, flapkit.load(tmp_path / "pruned")))
    assert torch.equal(before, after)
    assert PruningPlan.read(tmp_path / "pruned" / "plan.json").keep == plan.keep


def test_it_is_calibrated_on_conversations_and_answers(smollm2, tmp_path):
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two, three. " * 20}]
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 16)
    chat = {"calibration": f"{{dataset: {tmp_path / 'chat.jsonl'}, field: messages, samples: 16, length: 64}}"}
    changes = {**TEXT, **chat, "model.path": str(smollm2), "output": str(tmp_path / "out"), "evaluate.perplexity": "[]"}
    record = run(load_recipe(find_recipe("smollm2-chat20"), [f"{key}={value}" for key, value in changes.items()]))
    text = load_tokenizer(smollm2).decode(record.text.calibration.flatten())
    assert "<|im_start|>assistant\nOne, two" in text
    assert "Paris" in record.samples[0].dense
    assert record.samples[0].prompt == "user: What is the capital of France?"
