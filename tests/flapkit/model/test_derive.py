"""What `adapter: auto` derives is what a person declares, or it is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_llama
from transformers import AutoConfig, MambaConfig, T5Config, ViTConfig

import flapkit
from flapkit.model import derive as derive_module
from flapkit.model.declaration import with_experts
from flapkit.model.derive import Auto, as_yaml, derive
from flapkit.model.empty import sees
from flapkit.model.layout import sites_of
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.model.verify import verify, verify_loaded
from flapkit.recipe.plugin_files import load_family
from flapkit.registry import ADAPTER, Registry
from flapkit.system.errors import ModelError

DECLARED = sorted(set(Registry.load().names(ADAPTER)) - {"auto", "vicuna"})
"""Families whose declaration stands in the plugins; those of vision-language models are not derived."""


def same_sites(model_type: str) -> None:
    """Compare where a derived declaration cuts with where the plugin's does."""
    config = tiny_config(model_type)
    model = tiny_model(config)

    def rows(site):
        return frozenset((each.param, each.dim, tuple(each.indices_of([1]))) for each in site.couplings)

    def cuts(sites):
        return {(site.weight, site.expert, site.units, rows(site)) for site in sites}

    derived = cuts(sites_of(model, with_experts(derive(config), "channel")))
    assert derived == cuts(Registry.load().adapter_for(config).sites(config))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "olmo2"])
def test_derived_is_declared(model_type):
    same_sites(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", DECLARED)
def test_derived_is_declared_by_every_plugin(model_type):
    if sees(AutoConfig.for_model(model_type)):
        with pytest.raises(ModelError, match="derives no declarations of their language models"):
            derive(tiny_config(model_type))
    else:
        same_sites(model_type)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", ["apertus", "biogpt", "ernie4_5", "glm", "gpt_bigcode", "granitemoe", "olmoe", "persimmon", "xglm"]
)
def test_types_that_nobody_declared(model_type):
    config = tiny_config(model_type)
    model = tiny_model(config)
    family = with_experts(derive(config), "channel")
    assert verify(model, sites_of(model, family)).error <= 1e-5


def test_a_model_that_nobody_declared(tmp_path):
    """Prune, save and load it, prune it again: the checkpoint holds the declaration."""
    model = tiny_model(tiny_config("stablelm"))
    tokens = torch.randint(2, 96, (16, 12), generator=torch.Generator().manual_seed(0))
    plan = flapkit.prune_(model, tokens, ratio=0.3, adapter="auto")
    flapkit.save(model, tmp_path / "pruned", plan)
    loaded = flapkit.load(tmp_path / "pruned")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    before = loaded.num_parameters()
    flapkit.prune_(loaded, tokens, ratio=0.2)
    assert loaded.num_parameters() < before


def test_auto_leaves_declared_models_to_their_declaration():
    registry = Registry.load()
    config = tiny_config("llama")
    assert registry.resolve("auto", config) == registry.create(ADAPTER, "llama")
    asked = registry.resolve(Auto(unit="query_head"), config)
    assert asked == registry.create(ADAPTER, "llama", {"unit": "query_head"})
    assert registry.resolve(None, tiny_config("stablelm")).title == "auto (derived and verified)"


def test_what_was_derived_can_be_declared(tmp_path):
    family = derive(tiny_config("stablelm"))
    (tmp_path / "mine.yaml").write_text(as_yaml(family))
    assert load_family(tmp_path / "mine.yaml") == family


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "'t5' are encoder-decoders"),
        (ViTConfig(), "no causal language model of type 'vit'"),
        (MambaConfig(), "the model has no attention layers"),
        (tiny_config("codegen"), "no parameter matches the attention heads(.|\n)*model_types: \\[codegen\\]"),
    ],
)
def test_what_is_refused(config, message):
    with pytest.raises(ModelError, match=message):
        Auto().sites(config)


def test_a_declaration_that_does_not_hold_is_refused_with_what_was_derived(monkeypatch):
    monkeypatch.setattr(derive_module, "_attributes", lambda module, sizes: [])
    with pytest.raises(ModelError, match=r"layers\.0\.attention: the sliced model has an error of(.|\n)*name: my_phi3"):
        derive(tiny_config("phi3", vocab_size=97))


def test_layers_that_share_a_tensor():
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match="are tied; tied parameters cannot be pruned"):
        flapkit.prune_(model, torch.randint(0, 96, (8, 8)), adapter=Auto())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loaded_model_is_compared_and_left_as_it_is(dtype):
    model = tiny_model(tiny_config("olmo2"), dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    family = derive(model.config)
    verify_loaded(model, sites_of(model, family))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("added", "outputs", "message"),
    [
        (
            {"q_proj": "q", "k_proj": "k", "q_norm": "q", "k_norm": "k"},
            {},
            "its logits differ from the masked model's",
        ),
        ({"q_proj": "q"}, {}, "it does not run"),
    ],
)
def test_a_loaded_model_that_a_declaration_does_not_fit(added, outputs, message):
    model = tiny_model(tiny_config("olmo2"))
    attention, mlp = derive(model.config).blocks
    wrong = replace(attention, parameters={**attention.parameters, **added}, outputs=outputs)
    family = replace(derive(model.config), blocks=(wrong, mlp))
    with pytest.raises(ModelError, match=message):
        verify_loaded(model, sites_of(model, family))
