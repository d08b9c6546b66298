"""The configuration of a pruned model, as other programs read it."""

from __future__ import annotations

import pytest
import torch

import flapkit
from flapkit.model.classes import dense_config, pruned_classes
from flapkit.model.empty import CAUSAL_LM
from flapkit.model.tiny import tiny_config, tiny_model


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mixtral", "gpt2"])
def test_a_configuration_says_the_size_of_a_head_and_its_dense_form_is_the_dense_one(model_type):
    """vLLM would otherwise divide the hidden size by the heads of each pruned layer."""
    model = tiny_model(tiny_config(model_type))
    dense = model.config.to_dict()
    tokens = torch.randint(2, 96, (32, 12), generator=torch.Generator().manual_seed(0))
    flapkit.prune_(model, tokens, ratio=0.3)
    flapkit.prune_(model, tokens, ratio=0.3)
    assert model.config.head_dim == 8
    assert dense_config(model.config).to_dict() == dense


@pytest.mark.parametrize(("model_type", "can"), [("llama", True), ("bloom", False)])
def test_a_pruned_class_has_its_stock_classs_attention(model_type, can):
    """vLLM asks it, and otherwise loads a model that it cannot run."""
    head = pruned_classes(model_type).heads[CAUSAL_LM]
    assert (head.is_backend_compatible(), head._can_set_attn_implementation()) == (can, can)
