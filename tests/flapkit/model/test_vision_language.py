"""Vision-language models: the language model is pruned in place, and all else stays as it is."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import write_recipe
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import flapkit
from flapkit.checkpoint.bundled import bundled_models
from flapkit.checkpoint.export import check_exports, prospect_of
from flapkit.checkpoint.load import load_tokenizer
from flapkit.checkpoint.serving import vllm_obstacle
from flapkit.model.derive import derive
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.recipe.load import load_recipe
from flapkit.registry import EXPORTER, Registry
from flapkit.run.executors import check_execution
from flapkit.run.pipeline import run
from flapkit.run.target import find_target
from flapkit.system.errors import ModelError, RecipeError

IMAGE, PATCHES = 95, 4
"""The token that stands for a part of an image, and how many parts the tiny tower makes of one."""


def pruned(model, **options):
    tokens = torch.randint(2, IMAGE, (24, 12), generator=torch.Generator().manual_seed(0))
    return flapkit.prune_(model, tokens, ratio=0.4, **options)


@pytest.mark.parametrize("family", ["gemma3", "idefics3", "llava", "qwen2_5_vl", "smolvlm"])
def test_all_but_the_layers_stays(family):
    model = tiny_model(tiny_config(family))
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tower = model.config.vision_config
    plan = pruned(model)
    layers = model.config.flapkit["layers"]
    sites = [name for name in model.state_dict() if name.startswith(f"{layers}.")]
    assert any(model.state_dict()[name].shape != dense[name].shape for name in sites if name in dense)
    assert all(
        torch.equal(tensor, dense[name])
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{layers}.")
    )
    assert model.config.vision_config is tower
    assert len(plan.keep) == 2 * model.config.text_config.num_hidden_layers


def test_an_image_is_seen_as_before_saving(tmp_path):
    config = tiny_config("llava")
    config.image_token_index = IMAGE
    model = tiny_model(config)
    seen = {
        "input_ids": torch.tensor([[5, *[IMAGE] * PATCHES, 9, 11]]),
        "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    }
    plan = pruned(model)
    with torch.no_grad():
        expected = model(**seen).logits
        flapkit.save(model, tmp_path / "pruned", plan)
        for loaded in (
            flapkit.load(tmp_path / "pruned"),
            AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned"),
        ):
            assert torch.equal(loaded(**seen).logits, expected)
            other = loaded(**{**seen, "pixel_values": -seen["pixel_values"]}).logits
            assert not torch.allclose(other, expected)
    assert "AutoModelForImageTextToText" in (tmp_path / "pruned" / "README.md").read_text()
    text = AutoConfig.from_pretrained(tmp_path / "pruned").text_config
    assert text.model_type == "flapkit_llama"
    # A second pruning starts from the first one's sizes.
    again = flapkit.load(tmp_path / "pruned")
    pruned(again)
    assert again.num_parameters() < model.num_parameters()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer, and with a processor's settings of which flapkit needs to know nothing."""
    folder = tmp_path_factory.mktemp("llava") / "model"
    tokenizer = load_tokenizer(bundled_models()["tiny-llama"])
    tiny_model(tiny_config("llava", vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}, "odd": 1}))
    return folder


def test_a_run_keeps_the_processor(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def pruned(model):\n    return model\n" * 200)
    recipe = load_recipe(write_recipe(tmp_path, model={"path": str(folder)}, output=str(tmp_path / "out")))
    run(recipe)
    for name in ("preprocessor_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert type(flapkit.load(tmp_path / "out")).__name__ == "FlapkitLlavaForConditionalGeneration"


def test_what_a_vision_tower_excludes(folder, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, model={"path": str(folder)}, execution="layerwise"))
    target = find_target(recipe)
    with pytest.raises(RecipeError, match="have a vision tower beside their layers"):
        check_execution(recipe, target)
    for exporter in ("gguf", "hf-stock", "onnx", "torch-export", "compressed-tensors"):
        with pytest.raises(ModelError, match=f"export {exporter}: .*vision tower.*export to hf"):
            check_exports(
                [Registry.load().create(EXPORTER, exporter, {"verify": False})],
                prospect_of(target.config, target.sites),
            )
    assert "vision-language" in vllm_obstacle(target.config, target.sites)


def test_one_that_is_not_declared_is_refused():
    assert "llava_next" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with pytest.raises(ModelError, match=r"'llava_next' are vision-language models: .*derives no declarations"):
        derive(AutoConfig.for_model("llava_next"))
