"""A model that runs layer by layer gives what it gives whole."""

from __future__ import annotations

import pytest
import torch

import flapkit
from flapkit.checkpoint.weights import Weights
from flapkit.execution.stream import LayerStream, layers_of, verify
from flapkit.model.adapter import FamilyAdapter
from flapkit.model.classes import IMAGE_TEXT
from flapkit.model.empty import auto_class
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.pruning.collector import Collector, measure
from flapkit.pruning.moments import Moments
from flapkit.registry import ADAPTER, Registry
from flapkit.system.errors import ModelError


def stream_of(model, folder) -> LayerStream:
    model.save_pretrained(folder, max_shard_size="20KB")
    return LayerStream(model.config, Weights.of(folder.glob("*.safetensors")), layers_of(flapkit.sites(model)))


@torch.no_grad()
def test_layer_by_layer_is_whole(llama, tokens, tmp_path):
    stream = stream_of(llama, tmp_path)
    mask = torch.ones_like(tokens)
    mask[::2, :5] = 0
    batch, sites = {"input_ids": tokens, "attention_mask": mask}, flapkit.sites(llama)
    whole = measure(llama, sites, [Moments], [batch])
    hidden = None
    for index in range(len(stream)):
        with stream.loaded(index):
            of_layer = [site for site in sites if site.layer == index]
            with Collector(stream.model, of_layer, [Moments]) as collector:
                collector.begin(batch)
                hidden = stream.step(index, batch, hidden)
        for site in of_layer:
            found, expected = collector.statistics[site.name][Moments], whole[site.name][Moments]
            torch.testing.assert_close(found.variance, expected.variance)
            torch.testing.assert_close(found.mean, expected.mean)
    attended = mask.bool()
    logits = stream.logits(batch, hidden)
    torch.testing.assert_close(logits[attended], llama(**batch).logits[attended], atol=1e-5, rtol=1e-5)


def test_only_the_loaded_layer_is_in_memory(llama, tmp_path):
    stream = stream_of(llama, tmp_path)

    def in_memory():
        return {name.split(".")[2] for name, p in stream.model.named_parameters() if "layers" in name and not p.is_meta}

    assert in_memory() == set()
    for index in range(len(stream)):
        with stream.loaded(index):
            assert in_memory() == {str(index)}
    assert in_memory() == set()


def test_a_checkpoint_without_a_tensor(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    weights = Weights.of(tmp_path.glob("*.safetensors"))
    del weights._files["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        LayerStream(llama.config, weights, "model.layers")


def test_a_tensor_of_another_shape(llama, tmp_path):
    stream = stream_of(llama, tmp_path)
    llama.config.intermediate_size = 24
    stream = LayerStream(llama.config, Weights.of(tmp_path.glob("*.safetensors")), "model.layers")
    with pytest.raises(ModelError, match=r"the checkpoint has the shape"), stream.loaded(0):
        pass


FAMILIES = [
    (name, model_type)
    for name, adapter in Registry.load().names(ADAPTER).items()
    if issubclass(adapter, FamilyAdapter)
    for model_type in adapter.family.model_types
    if auto_class(model_type) != IMAGE_TEXT  # refused: test_vision_language
]


@pytest.mark.parametrize(("name", "model_type"), FAMILIES)
def test_every_family(name, model_type):
    config = tiny_config(model_type)
    verify(config, layers_of(Registry.load().create(ADAPTER, name).sites(config)))


def test_what_does_not_hold_is_refused(monkeypatch):
    monkeypatch.setattr(LayerStream, "logits", lambda self, batch, hidden: torch.zeros(2, 12, 96))
    with pytest.raises(ModelError, match="models of type 'llama' cannot be run layer by layer"):
        verify(tiny_config("llama"), "model.layers")


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bloom", "falcon", "llama"])
def test_from_the_middle(model_type, tmp_path):
    """A stream that begins behind some layers gives what one gives that ran them, whatever form they answer in."""
    name = next(name for name, known in FAMILIES if known == model_type)
    model = tiny_model(tiny_config(model_type, num_hidden_layers=6))
    path = layers_of(Registry.load().create(ADAPTER, name).sites(model.config))
    forms = verify(model.config, path)
    model.save_pretrained(tmp_path)
    weights = Weights.of(tmp_path.glob("*.safetensors"))
    batch = {"input_ids": torch.randint(96, (3, 7), generator=torch.Generator().manual_seed(0))}
    first, second = (LayerStream(model.config, weights, path, forms=known) for known in (None, forms))
    hidden = None
    for index in range(6):
        with first.loaded(index), second.loaded(index):
            before, hidden = hidden, first.step(index, batch, hidden)
            if index == 5:
                torch.testing.assert_close(second.step(index, batch, before), hidden)
    torch.testing.assert_close(second.logits(batch, hidden), model(**batch).logits, atol=1e-4, rtol=1e-4)
