"""Declarations: how layouts become slices, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_llama
from transformers import MambaConfig, Phi3Config, T5Config, ViTConfig

import flapkit
from flapkit.model import verify as verify_module
from flapkit.model.adapter import adapter_class
from flapkit.model.budget import Budget
from flapkit.model.declaration import Block, Family, evaluate
from flapkit.model.layout import sites_of
from flapkit.model.surgery import mask_
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.model.verify import random_plan, verify
from flapkit.recipe.plugin_files import load_family
from flapkit.registry import ADAPTER, Registry
from flapkit.system.errors import InputError, ModelError, PluginError

ATTENTION = Block("attention", "self_attn", "o_proj", {"q_proj": "q", "k_proj": "k", "v_proj": "k"})
MLP = Block("mlp", "mlp", "down_proj", {"gate_proj": "i", "up_proj": "i"})
MINE = Family("mine", ("llama",), "model.layers", (ATTENTION, MLP))


def family(**changes) -> Family:
    return replace(MINE, **changes)


def indices(layout: str, unit="kv_group", heads=4, kv_heads=2) -> list[list[int]]:
    """Lay out one row a head, and list the rows that go with each unit."""
    model = make_llama(num_key_value_heads=kv_heads, head_dim=1)
    attention = model.model.layers[0].self_attn
    rows = {"q": heads, "k": kv_heads}
    attention.fused = torch.nn.Linear(32, sum(rows[part] for part in layout.strip("()").split("+")), bias=False)
    block = replace(ATTENTION, parameters={"fused": layout}, attributes={"num_key_value_groups": "H//K"})
    model.model.layers = model.model.layers[:1]
    (site,) = sites_of(model, family(blocks=(block,)), unit)
    return [sorted(i for c in site.couplings for i in c.indices_of([u])) for u in range(site.units)]


@pytest.mark.parametrize(
    ("layout", "unit", "expected"),
    [
        ("q", "kv_group", [[0, 1], [2, 3]]),
        ("k", "kv_group", [[0], [1]]),
        ("q+k+k", "kv_group", [[0, 1, 4, 6], [2, 3, 5, 7]]),
        ("(q+k+k)", "kv_group", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("q+k+k", "query_head", [[0], [1], [2], [3]]),
        ("(q+k+k)", "query_head", [[0], [1], [4], [5]]),
    ],
)
def test_rows_of_a_layout(layout, unit, expected):
    assert indices(layout, unit) == expected


def test_one_key_value_head_has_query_heads_for_units():
    assert indices("q+k+k", kv_heads=1) == [[0], [1], [2], [3]]


def test_expressions():
    assert evaluate("2*K*D+H//K", {"H": 6, "K": 3, "D": 4}) == 26
    for bad in ("H**2", "__import__('os')", "X", "H.real", "'a'", "H//"):
        with pytest.raises((ValueError, SyntaxError)):
            evaluate(bad, {"H": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "model.layer"}, "adapter 'mine': LlamaForCausalLM has no module model.layer"),
        ({"layers": "model.norm"}, "model.norm is a LlamaRMSNorm, not a list of layers"),
        ({"blocks": (replace(MLP, path="ffn"),)}, "no layer of model.layers has ffn.down_proj \\(block mlp\\)"),
        ({"blocks": (replace(MLP, parameters={"gated": "i"}),)}, "the module has no gated"),
        (
            {"blocks": (replace(ATTENTION, parameters={"q_proj": "q+k+k"}),)},
            r"q_proj.weight: 32 rows do not fit the layout 'q\+k\+k' with H 4, K 1",
        ),
        ({"blocks": (replace(ATTENTION, heads="heads"),)}, "heads"),
    ],
)
def test_a_declaration_that_does_not_fit(changes, message):
    with pytest.raises(ModelError, match=message):
        sites_of(make_llama(num_key_value_heads=1), family(**changes))


@pytest.mark.parametrize(
    ("kind", "parameters", "options", "message"),
    [
        ("attention", {"q_proj": "q+"}, {}, r"q_proj: 'q\+' is not a layout of attention"),
        ("attention", {"q_proj": "i"}, {}, "is not a layout of attention"),
        ("mlp", {"up_proj": "q"}, {}, "is not a layout of mlp"),
        ("mlp", {"up_proj": "i"}, {"attributes": {"width": "H"}}, "'H' is not an expression of I"),
        ("mlp", {"up_proj": "i"}, {"reads": {"width": "I+"}}, "width: 'I\\+' cannot be evaluated: invalid syntax"),
    ],
)
def test_a_declaration_that_says_nothing(kind, parameters, options, message):
    with pytest.raises(InputError, match=message):
        Block(kind, "self_attn", "o_proj", parameters, **options)


@pytest.mark.parametrize("forgotten", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
def test_a_forgotten_parameter_is_named(forgotten):
    blocks = tuple(
        replace(block, parameters={name: layout for name, layout in block.parameters.items() if name != forgotten})
        for block in MINE.blocks
    )
    model = tiny_model(tiny_config("llama"))
    with pytest.raises(ModelError, match=rf"the declaration does not name .*{forgotten}\.weight"):
        verify(model, sites_of(model, family(blocks=blocks)))


def test_a_declaration_is_verified_once_for_each_configuration(monkeypatch):
    verified = []
    monkeypatch.setattr(verify_module, "verify", lambda model, sites: verified.append(model.config))
    declared = family(blocks=(replace(ATTENTION, attributes={"num_key_value_groups": "H//K"}), MLP))
    mine = adapter_class(declared)
    for adapter, config in ((mine(), tiny_config("llama")), (mine(), tiny_config("llama"))):
        adapter.check_declaration(config)
    assert len(verified) == 1
    mine(unit="query_head").check_declaration(tiny_config("llama"))
    mine().check_declaration(tiny_config("llama", attention_bias=True))
    assert [config.attention_bias for config in verified] == [False, False, True]
    # Another registry's class of the same declaration is the same one.
    adapter_class(replace(declared))().check_declaration(tiny_config("llama"))
    assert len(verified) == 3
    adapter_class(replace(declared, name="other"))().check_declaration(tiny_config("llama"))
    assert len(verified) == 4


def test_prune_refuses_a_wrong_declaration_before_it_starts():
    model = make_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = adapter_class(family(blocks=(ATTENTION, replace(MLP, parameters={"gate_proj": "i"}))))
    with pytest.raises(ModelError, match=r"is wrong for models of type 'llama'.*does not name .*up_proj"):
        flapkit.prune_(model, torch.randint(0, 96, (8, 8)), adapter=wrong())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_pruned_model_has_the_declaration_of_its_dense_one(tokens):
    model = make_llama(num_key_value_heads=2)
    flapkit.prune_(model, tokens, ratio=0.4)
    Registry.load().adapter_for(model.config).check_declaration(model.config)


def test_options_that_no_tiny_model_has():
    """A rotary table for the model's own head size does not fit a tiny model: the class's defaults are verified."""
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = Phi3Config(rope_parameters=factors, max_position_embeddings=131072, original_max_position_embeddings=4096)
    Registry.load().adapter_for(config).check_declaration(config)


def test_a_norm_over_all_heads_is_caught():
    """It raises nothing: the pruned model runs, and is wrong."""
    model = tiny_model(tiny_config("olmo2"))
    whole = replace(ATTENTION, parameters={**ATTENTION.parameters, "q_norm": "q", "k_norm": "k"})
    with pytest.raises(ModelError, match=r"layers\.0\.attention: the sliced model has an error of"):
        verify(model, sites_of(model, family(blocks=(whole, MLP))))


def test_consumers_that_compute_nothing():
    """A declaration of layers that do not matter proves nothing, and says so."""
    model = tiny_model(tiny_config("llama"))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    with pytest.raises(ModelError, match="changes the logits by only"):
        verify(model, sites_of(model, family(blocks=(MLP,))))


def test_layers_that_share_a_tensor():
    model = make_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match="are tied; tied parameters cannot be pruned"):
        flapkit.prune_(model, torch.randint(0, 96, (8, 8)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "'t5' are encoder-decoders"),
        (ViTConfig(), "no causal language model of type 'vit'"),
        (MambaConfig(), "no plugin declares models of type 'mamba'"),
    ],
)
def test_what_is_refused_by_name(config, message):
    with pytest.raises(ModelError, match=message):
        Registry.load().adapter_for(config).sites(config)


def test_query_heads_keep_the_same_number(probe):
    model = make_llama(num_attention_heads=8, num_key_value_heads=2)
    adapter = Registry.load().create(ADAPTER, "llama", {"unit": "query_head"})
    sites = adapter.sites(model.config)
    assert [(site.units, site.runs) for site in sites if site.kind == "attention"] == [(8, 2), (8, 2)]
    plan = flapkit.prune_(model, torch.randint(0, 96, (24, 16)), ratio=0.3, adapter=adapter)
    for site in sites[::2]:
        kept = plan.keep[site.name]
        assert sum(unit < 4 for unit in kept) == sum(unit >= 4 for unit in kept)
    uneven = {**plan.keep, "layers.0.attention": (0, 1, 2, 4)}
    with pytest.raises(InputError, match="must keep the same number"):
        mask_(make_llama(num_attention_heads=8, num_key_value_heads=2), sites, type(plan)(uneven))


def test_a_ratio_means_the_same_number_whatever_the_unit():
    config = make_llama(num_attention_heads=8, num_key_value_heads=2).config
    groups, single = (
        Registry.load().create(ADAPTER, "llama", {"unit": unit}).sites(config) for unit in ("kv_group", "query_head")
    )
    assert [site.params for site in groups] == [site.params for site in single]
    for of in ("blocks", "attention", "mlp"):
        assert Budget.over(groups, 0.3, of).params == Budget.over(single, 0.3, of).params > 0


def test_query_heads_where_a_family_has_none():
    with pytest.raises(ModelError, match="unit: query_head"):
        Registry.load().create(ADAPTER, "falcon", {"unit": "query_head"}).sites(
            tiny_config("falcon", new_decoder_architecture=True)
        )


def test_experts_keep_the_same_width():
    config = tiny_config("mixtral")
    sites = [site for site in Registry.load().adapter_for(config).sites(config) if site.expert is not None]
    plan = random_plan(sites)
    assert len({len(plan.keep[site.name]) for site in sites if site.layer == 0}) == 1
    first = sites[0]
    with pytest.raises(InputError, match=r"experts of layers\.0\.experts must keep the same number"):
        type(plan)({**plan.keep, first.name: plan.keep[first.name][:-1]}).check(sites)


def test_sites_need_no_weights():
    """A LLaMA of 65B, from its configuration alone, with the count that its tensors have."""
    config = make_llama().config.__class__(
        hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64
    )
    sites = Registry.load().adapter_for(config).sites(config)
    assert sum(site.params for site in sites) == 80 * (4 * 8192**2 + 3 * 8192 * 22016)


def test_a_yaml_file_with_mistakes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nmodel_types: [mine]\nlayer: x\nblocks:\n  - {kind: mlp, path: mlp, consumer: 3}\n")
    with pytest.raises(PluginError) as caught:
        load_family(path)
    said = str(caught.value)
    assert f"{path}:3:1: layer: unknown key; did you mean 'layers'" in said
    assert f"{path}:5:" in said
    path.write_text("")
    with pytest.raises(PluginError, match="it needs name, model_types, layers and blocks"):
        load_family(path)
