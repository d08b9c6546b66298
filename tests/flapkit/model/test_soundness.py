"""What stands between a model and its weights is named, with the call that undoes it, and the call works."""

from __future__ import annotations

import pytest
import torch
from accelerate import disk_offload
from conftest import make_llama
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from transformers import PreTrainedModel

import flapkit
from flapkit.system.errors import ModelError

PLACE = "model.layers.0.mlp.down_proj"


class Around(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model


def in_place(change):
    def changed(model):
        change(model.get_submodule(PLACE))
        return model

    return changed


def compiled_layer(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["o_proj"])).get_base_model()


CHANGES = {
    "torch.compile": (lambda model: torch.compile(model, backend="eager"), "by torch.compile", "model._orig_mod"),
    "a compiled layer": (compiled_layer, "by torch.compile", 'model.get_submodule("model.layers.1")._orig_mod'),
    "several devices": (nn.DataParallel, "for several devices", "model.module"),
    "Lightning": (Around, "found a Around", "model.model"),
    "masks": (
        in_place(lambda linear: prune.l1_unstructured(linear, "weight", 0.5)),
        "its weight is masked by torch.nn.utils.prune",
        f'torch.nn.utils.prune.remove(model.get_submodule("{PLACE}"), "weight")',
    ),
    "a parametrization": (
        in_place(parametrizations.weight_norm),
        "its weight is computed by a parametrization",
        f'torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule("{PLACE}"), "weight")',
    ),
    "weight_norm": (
        in_place(weight_norm),
        "its weight is computed by torch.nn.utils.weight_norm",
        f'torch.nn.utils.remove_weight_norm(model.get_submodule("{PLACE}"), "weight")',
    ),
    "spectral_norm": (
        in_place(spectral_norm),
        "its weight is computed by torch.nn.utils.spectral_norm",
        f'torch.nn.utils.remove_spectral_norm(model.get_submodule("{PLACE}"), "weight")',
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(("change", "what", "undo"), CHANGES.values(), ids=CHANGES)
def test_what_stands_before_the_weights_is_named(tokens, change, what, undo):
    model = change(make_llama())
    with pytest.raises(ModelError) as refused:
        flapkit.prune_(model, tokens, ratio=0.4)
    message = str(refused.value)
    assert what in message
    assert f"`{undo}`" in message
    assert "quantised" not in message
    undone = eval(undo, {"model": model, "torch": torch})
    if change is compiled_layer:
        model.model.layers[1] = undone
    flapkit.prune_(undone if isinstance(undone, PreTrainedModel) else model, tokens, ratio=0.4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_that_is_not_merged(tokens):
    with pytest.raises(ModelError, match=r"has an adapter of peft that is not merged; merge it: .*merge_and_unload"):
        flapkit.prune_(lora(make_llama()), tokens)


def test_offloaded_weights(tokens, tmp_path):
    model = make_llama()
    disk_offload(model, tmp_path, execution_device="cpu")
    with pytest.raises(ModelError, match=r"is not in the device's memory .*`execution: layerwise`"):
        flapkit.prune_(model, tokens)


@pytest.mark.parametrize("model", ["builtin:tiny-llama", nn.Linear(4, 4), None])
def test_what_is_no_model(tokens, model):
    with pytest.raises(ModelError, match="expected a transformers model, found a"):
        flapkit.prune_(model, tokens)
    with pytest.raises(ModelError, match="expected a transformers model, found a"):
        flapkit.sites(model)
