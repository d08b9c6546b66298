"""compressed-tensors, run by transformers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import make_llama, write_recipe
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import flapkit
from flapkit.checkpoint.export import export, prospect_of
from flapkit.checkpoint.formats import Prospect
from flapkit.checkpoint.load import open_weights
from flapkit.model.declaration import declaration_of
from flapkit.model.empty import skeleton
from flapkit.model.layout import sites_of
from flapkit.registry import EXPORTER, Registry
from flapkit.system.errors import InputError, ModelError

slow = pytest.mark.slow
WIDTHS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}


def compressed(**options):
    return Registry.load().create(EXPORTER, "compressed-tensors", options)


def prospect(config, multiple_of=1) -> Prospect:
    adapter = Registry.load().adapter_for(config)
    found = prospect_of(config, adapter.sites(config))
    return Prospect(found.family, config, found.sites, False, frozenset(), multiple_of)


@pytest.fixture
def grouped(tokens, tmp_path):
    """A pruned LLaMA whose layers differ, in widths that groups of 32 divide."""
    model = make_llama(**WIDTHS)
    flapkit.save(model, tmp_path / "grouped", flapkit.prune_(model, tokens, ratio=0.3, of="attention"))
    return tmp_path / "grouped"


@slow
@pytest.mark.parametrize(("scheme", "steps", "same_top"), [("w8a8", 0.5, 0.9), ("w4a16", 0.5, 0.4), ("fp8", 16, 0.7)])
def test_each_weight_is_rounded_to_the_nearest_step_of_its_scale(grouped, tmp_path, scheme, steps, same_top):
    exporter = compressed(scheme=scheme, group_size=32)
    found = export(grouped, exporter, tmp_path / "out")
    assert found.relative > 0
    assert found.same_top >= same_top
    dense, stored = open_weights(grouped), load_file(tmp_path / "out" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # The first text unpacks the weights.
    model(torch.tensor([[1, 2]]))
    rounded = dict(model.named_parameters())
    for name in (name.removesuffix("_scale") for name in stored if name.endswith("weight_scale")):
        scale = stored[f"{name}_scale"].repeat_interleave(dense[name].shape[1] // stored[f"{name}_scale"].shape[1], 1)
        assert ((rounded[name] - dense[name]).abs() <= steps * scale * 1.001).all(), name
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.o_proj.bias"):
        assert torch.equal(stored[name], dense[name])


@slow
def test_the_folder_loads_without_flapkit_and_says_what_it_is(pruned_folder, tmp_path):
    export(pruned_folder, compressed(dtype="bfloat16"), tmp_path / "out")
    code = (
        "import sys, torch; sys.modules['flapkit'] = None\n"
        "from transformers import AutoModelForCausalLM as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True)\n"
        "print(model.dtype, model.generate(torch.tensor([[1, 2]]), max_new_tokens=4).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "torch.bfloat16 torch.Size([1, 6])" in done.stdout, done.stderr
    assert "## Quantised" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ModelError, match=r"quantised \(compressed-tensors\)"):
        flapkit.load(tmp_path / "out")


SMOLLM2 = LlamaConfig(num_hidden_layers=1, hidden_size=576, num_attention_heads=9, num_key_value_heads=3)


@pytest.mark.parametrize(
    ("config", "options", "multiple_of", "message"),
    [
        (LlamaConfig(num_hidden_layers=1), {}, 1, ""),
        (LlamaConfig(num_hidden_layers=1), {"scheme": "w4a16"}, 128, ""),
        (
            LlamaConfig(num_hidden_layers=1),
            {"scheme": "w4a16"},
            64,
            r"may not divide .*mlp\.down_proj; set budget\.multiple_of: 128",
        ),
        (SMOLLM2, {"scheme": "w4a16"}, 128, r"q_proj has 576 input channels.*set group_size: 64, or scheme: w8a8"),
        (SMOLLM2, {"scheme": "w4a16", "group_size": 64}, 64, ""),
        (GPT2Config(n_layer=1), {}, 1, r"c_proj is not a torch\.nn\.Linear"),
    ],
)
def test_widths_are_checked_before_the_run(config, options, multiple_of, message):
    if message:
        with pytest.raises(ModelError, match=message):
            compressed(**options).check(prospect(config, multiple_of))
    else:
        compressed(**options).check(prospect(config, multiple_of))


def test_a_width_that_groups_do_not_divide_is_named(tokens):
    model = make_llama(**WIDTHS, num_hidden_layers=1)
    flapkit.prune_(model, tokens, ratio=0.3, of="mlp")
    found = prospect_of(model.config, sites_of(skeleton(model.config), declaration_of(model.config)))
    message = r"layers\.0\.mlp\.down_proj has \d+ input channels.*prune with budget\.multiple_of: 32"
    with pytest.raises(ModelError, match=message):
        compressed(scheme="w4a16", group_size=32).check(found)


def test_flapkit_check_refuses_such_a_recipe(command, tmp_path, monkeypatch):
    monkeypatch.setattr(type(compressed()), "packages", ())
    write_recipe(tmp_path, export=[{"name": "compressed-tensors", "scheme": "w4a16", "group_size": 64}])
    code, _, err = command("check", "recipe.yaml")
    assert code
    assert "budget.multiple_of: 64" in err
    code, _, _ = command("check", "recipe.yaml", "--set", "budget.multiple_of=64")
    assert code == 0


def test_a_missing_package(pruned_folder, tmp_path, without):
    without("compressed_tensors")
    with pytest.raises(InputError, match=r"needs compressed_tensors.*flapkit\[compressed-tensors\]"):
        export(pruned_folder, compressed(), tmp_path / "out")
