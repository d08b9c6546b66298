"""What vLLM does not serve is known before a run; `make test-serve` checks it against vLLM."""

from __future__ import annotations

import pytest

from flapkit.checkpoint.serving import vllm_obstacle
from flapkit.model.tiny import tiny_config
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
