"""Models that accelerate spreads over several devices: ``model.device_map``."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import make_llama, write_recipe
from safetensors.torch import load_file
from spread import spread_

import flapkit
from flapkit.api import PruneOptions
from flapkit.checkpoint import load as loading
from flapkit.evaluation.batch_size import first_batch_size
from flapkit.execution.lightning.module import CausalLM
from flapkit.model.spread import is_spread
from flapkit.recipe.load import load_recipe
from flapkit.run import executors
from flapkit.run.check import check
from flapkit.run.pipeline import run
from flapkit.system.errors import ModelError, RecipeError

MODEL = {"path": "builtin:tiny-llama", "dtype": "float32", "save_dtype": "float32"}
METHODS = {
    "plain": {},
    "least squares, sequential": {"compensator": "least_squares", "options": PruneOptions(sequential=True)},
    "gradients": {"metric": "taylor"},
    "trials": {"searcher": {"name": "evolution", "generations": 1, "children": 2, "survivors": 1}},
}


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_spread_model_is_pruned_like_any_other(tokens, probe, method):
    whole, spread = make_llama(), spread_(make_llama())
    assert is_spread(spread)
    plan = flapkit.prune_(whole, tokens, ratio=0.4, **METHODS[method])
    assert flapkit.prune_(spread, tokens, ratio=0.4, **METHODS[method]) == plan
    assert torch.equal(spread(probe).logits, whole(probe).logits)


def test_a_saved_spread_model_is_a_model(tokens, probe, tmp_path):
    spread = spread_(make_llama())
    flapkit.prune_(spread, tokens, ratio=0.4)
    flapkit.save(spread, tmp_path / "pruned")
    assert torch.equal(flapkit.load(tmp_path / "pruned")(probe).logits, spread(probe).logits)


def test_a_recipe_prunes_a_spread_model(text_folder, monkeypatch, cache):
    """Measured on the spread model, and from statistics that another run has left."""

    def run_as(name, device_map):
        model = {**MODEL, "device_map": device_map}
        changes = {"model": model, "output": name, "evaluate": EVALUATE}
        return run(load_recipe(write_recipe(text_folder, **changes)), cache=None if name == "measured" else cache)

    run_as("whole", None)
    monkeypatch.setattr(executors, "load", lambda *args, device_map, **options: spread_(loading.load(*args, **options)))
    for name in ("measured", "cached"):
        run_as(name, "auto")
        expected, found = (
            load_file(folder / "model.safetensors") for folder in (text_folder / "whole", text_folder / name)
        )
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[tensor], expected[tensor]) for tensor in found)
        results = [json.loads((text_folder / of / "result.json").read_text()) for of in ("whole", name)]
        assert results[0]["perplexity"] == results[1]["perplexity"]


EVALUATE = {
    "perplexity": [{"dataset": "text.txt", "length": 32, "windows": 4}],
    "samples": {"prompts": ["def "], "tokens": 4},
}


@pytest.fixture
def text_folder(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("def pruned(model):\n    return model\n" * 200)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_lightning_leaves_a_spread_model_where_it_is():
    assert list(CausalLM(spread_(make_llama())).named_parameters()) == []


def test_a_batch_fits_on_the_device_with_the_least_memory_left(monkeypatch):
    memory = {"cuda:0": 2**40, "cuda:1": 2**20}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory[str(device)])
    )
    llama = make_llama()
    weights = [
        SimpleNamespace(device=torch.device("cuda", index % 2), nbytes=parameter.nbytes)
        for index, parameter in enumerate(llama.parameters())
    ]
    spread: Any = SimpleNamespace(
        parameters=lambda: iter(weights), hf_device_map={"": 0, "lm_head": 1}, config=llama.config, dtype=llama.dtype
    )
    small = first_batch_size(spread, 32, torch.device("cuda", 0))
    memory["cuda:1"] = 2**40
    assert small < first_batch_size(spread, 32, torch.device("cuda", 0))


def test_on_one_device_it_is_a_plain_model(text_folder):
    recipe = load_recipe(write_recipe(text_folder, model={**MODEL, "device_map": {"": "cpu"}}))
    assert run(recipe).output.is_dir()


REFUSED = {
    "layerwise": ({"execution": "layerwise"}, "does not go with execution: layerwise"),
    "sharded": ({"trainer": {"strategy": "model_parallel", "devices": 2}}, "does not go with trainer.strategy"),
    "processes": ({"trainer": {"accelerator": "cpu", "devices": 2}}, "does not go with several processes"),
    "precision": ({"trainer": {"precision": "bf16-true"}}, "set model.dtype instead"),
    "recovery": ({"compensator": ["bias", {"name": "lora"}]}, "does not go with a compensator that trains"),
    "gates": ({"searcher": "gates"}, "does not go with a searcher that trains"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_with_it_is_one_line(tmp_path, what):
    changes, message = REFUSED[what]
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(write_recipe(tmp_path, model={**MODEL, "device_map": "auto"}, **changes))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": "disk"}, "offloaded to the disk; set `execution: layerwise`"),
        ("everywhere", "device_map"),
        ({"model": 1.5}, "device_map"),
    ],
)
def test_a_wrong_map_is_refused(tmp_path, device_map, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(tmp_path, model={**MODEL, "device_map": device_map}))


def test_an_offloaded_part_is_refused_when_it_is_loaded(text_folder, monkeypatch):
    monkeypatch.setattr(executors, "load", lambda *args, **options: cpu_offload(loading.load(*args)))
    with pytest.raises(ModelError, match=r"its device_map offloads it.*execution: layerwise"):
        run(load_recipe(write_recipe(text_folder, model={**MODEL, "device_map": "auto"})))
    assert not (text_folder / "out").exists()


def test_another_device_than_the_trainers_is_refused(text_folder, monkeypatch):
    monkeypatch.setattr(executors, "embeddings_device", lambda model: torch.device("cuda", 1))
    with pytest.raises(RecipeError, match="leave device_map out"):
        run(load_recipe(write_recipe(text_folder, model={**MODEL, "device_map": {"": "cpu"}})))


def test_without_accelerate_it_is_said(text_folder, monkeypatch):
    monkeypatch.setattr("flapkit.model.spread.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install accelerate"):
        check(load_recipe(write_recipe(text_folder, model={**MODEL, "device_map": "auto"})))
    with pytest.raises(ModelError, match="pip install accelerate"):
        flapkit.load("builtin:tiny-llama", device_map="auto")


def test_a_recovery_of_a_spread_model_is_refused(tokens):
    options = PruneOptions(recovery_text=tokens)
    with pytest.raises(ModelError, match="spread over several; load it without device_map"):
        flapkit.prune_(spread_(make_llama()), tokens, compensator=["bias", "lora"], options=options)
