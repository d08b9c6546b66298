"""A sequence longer than a model's table of positions is refused by every command before anything runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import RECIPE, write_recipe
from transformers import GPT2Config, GPT2LMHeadModel

from flapkit.checkpoint.bundled import bundled_models

TEXT = {"dataset": "text.txt", "length": 64, "windows": 2}
LORA = {"name": "lora", "length": 65, "dataset": "stdlib"}


@pytest.fixture
def short(home: Path) -> Path:
    """A model with 64 positions."""
    bundled = bundled_models()["tiny-llama"]
    GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_positions=64, n_embd=32, n_layer=2, n_head=4)).save_pretrained(
        home / "short"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled / name, home / "short")
    return home / "short"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": {**RECIPE["calibration"], "length": 65}}, "calibration.length: 65 tokens"),
        ({"evaluate": {"perplexity": [TEXT, {**TEXT, "length": 65}]}}, "evaluate.perplexity[1].length: 65 tokens"),
        ({"evaluate": {"samples": {"prompts": ["def"], "tokens": 80}}}, "evaluate.samples.prompts[0] and `tokens`: "),
        ({"compensator": [LORA]}, "compensator: length: 65 tokens"),
    ],
)
@pytest.mark.parametrize("name", ["check", "run"])
def test_what_is_too_long(command, home, short, changes, message, name):
    code, _, said = command(name, write_recipe(home, model={"path": str(short), "dtype": "float32"}, **changes))
    assert code == 2
    assert message in said
    assert f"but {short} has positions for 64 only" in said


def test_evaluations_of_a_checkpoint_and_of_the_dense_model(command, home, short):
    recipe = write_recipe(home, evaluate={"perplexity": [{**TEXT, "length": 65}]})
    for models in ([short], ["builtin:tiny-llama", "--against", short]):
        code, _, said = command("evaluate", *models, "--recipe", recipe)
        assert (code, "evaluate.perplexity[0].length: 65 tokens" in said) == (2, True)


def test_beyond_a_computed_context_check_warns(command, home):
    recipe = write_recipe(home, calibration={**RECIPE["calibration"], "length": 600})
    code, out, _ = command("check", recipe)
    assert code == 0
    assert "calibration.length: 600 tokens, but the model was made for 512" in " ".join(out.split())
