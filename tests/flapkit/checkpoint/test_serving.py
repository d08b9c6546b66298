"""What vLLM does not serve is known before a run; `make test-serve` checks it against vLLM."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

import flapkit
from flapkit.checkpoint.serving import vllm_obstacle
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.registry import ADAPTER, Registry


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ""),
        ("gemma2", ""),
        ("bloom", "BloomForCausalLM does not use transformers' attention interface"),
        ("gpt2", "vLLM does not load the projections of GPT2LMHeadModel, which are of the type Conv1D"),
        ("deepseek_v2", "vLLM's latent attention needs layers that do not differ"),
        ("mixtral", "vLLM's experts have the same width in all layers"),
        ("lfm2", "layer 0 has no attention"),
    ],
)
def test_what_is_in_the_way_of_vllm(family, expected):
    config = tiny_config(family)
    assert vllm_obstacle(config, Registry.load().create(ADAPTER, family).sites(config)) == expected


@pytest.mark.parametrize("family", ["llama", "olmo2", "olmo3"])
def test_what_vllm_replaces_has_no_hooks(family):
    """It replaces linears and norms, and drops their hooks without a message."""
    model = tiny_model(tiny_config(family))
    flapkit.prune_(model, torch.randint(2, 96, (16, 12), generator=torch.Generator().manual_seed(0)), ratio=0.4)
    hooked = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    assert hooked == []


def test_a_model_is_built_from_a_copy_of_its_configurations_class(pruned_folder):
    """The processes of vLLM's server send each other the configuration with a copy of its class."""
    file = pruned_folder / "modeling_flapkit_llama.py"
    first, second = (import_file(name, file) for name in ("first_copy", "second_copy"))
    config = first.FlapkitLlamaConfig.from_dict(json.loads((pruned_folder / "config.json").read_text()))
    model = second.FlapkitLlamaForCausalLM(config)
    assert type(model.config) is first.FlapkitLlamaConfig
    assert model.num_parameters() == flapkit.load(pruned_folder).num_parameters()


def import_file(name, file):
    """Import a module under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
