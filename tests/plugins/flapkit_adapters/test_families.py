"""Every declaration that comes with flapkit is exact on tiny random models of its class."""

from __future__ import annotations

import pytest

from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.model.verify import verify
from flapkit.registry import Registry

FAMILIES = {name: {} for name in Registry.load().names("adapter") if name not in ("auto", "vicuna", "falcon")} | {
    "llama with a key/value head": {"num_key_value_heads": 1},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "cohere with norms": {"use_qk_norm": True},
    "deepseek_v2 without a query's latent": {"q_lora_rank": None},
    "falcon 40B": {"new_decoder_architecture": True},
    "falcon 7B": {"multi_query": True},
    "falcon RW": {"multi_query": False, "alibi": True, "num_kv_heads": 4},
}


@pytest.mark.parametrize("form", FAMILIES)
def test_sliced_is_masked(form):
    config = tiny_config(form.split()[0], **FAMILIES[form])
    sites = Registry.load().adapter_for(config).sites(config)
    proof = verify(tiny_model(config), sites)
    assert proof.error <= 1e-5
    assert proof.effect > 0.1
