"""A pruned model is built from a configuration whose classes are copies of its own."""

from __future__ import annotations

import importlib.util

import flapkit
from flapkit.model.classes import CAUSAL_LM, pruned_classes


def test_a_configuration_that_another_process_made_builds_the_model(pruned_folder):
    # vLLM hands it to its workers by value: its classes are copies there.
    spec = importlib.util.spec_from_file_location("copy", pruned_folder / "modeling_flapkit_llama.py")
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    config = copy.FlapkitLlamaConfig.from_pretrained(pruned_folder)
    model = pruned_classes("llama").heads[CAUSAL_LM](config)
    assert type(model.config) is copy.FlapkitLlamaConfig
    expected = {name: weight.shape for name, weight in flapkit.load(pruned_folder).named_parameters()}
    assert {name: weight.shape for name, weight in model.named_parameters()} == expected
