from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from transformers import GPT2Config, GPT2LMHeadModel

from flapkit.evaluation.speed import Spread, Workload, measure_speed, read_params, turns
from flapkit.system.errors import InputError

SMALL = Workload(batch_size=2, prompt=12, tokens=3, repetitions=2, warm_up=1)


def test_the_multiply_accumulates_are_exact() -> None:
    model = make_llama(num_key_value_heads=2)
    config, prompt = model.config, SMALL.prompt
    speed = measure_speed({"model": model}, SMALL)["model"]
    linears = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    head = config.vocab_size * config.hidden_size
    # Queries times keys and weights times values, for every head.
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert speed.prefill_macs == SMALL.batch_size * (linears * prompt + head + attention * prompt**2)
    assert speed.decode_macs == SMALL.batch_size * (linears + head + attention * (prompt + 1))


def test_models_take_turns() -> None:
    models = {name: make_llama() for name in "ab"}
    order = []
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    found = measure_speed(models, SMALL)
    # Each turn is a prompt and the tokens after it; what comes before counts and weighs.
    turn = 1 + SMALL.tokens
    timed = "".join(order)[-turns(2, SMALL) * turn :]
    assert timed == ("a" * turn + "b" * turn) * 3
    assert all(len(speed.decode.values) == 2 for speed in found.values())


def test_every_turn_ticks() -> None:
    ticks: list[None] = []
    measure_speed({"model": make_llama()}, SMALL, tick=lambda: ticks.append(None))
    assert len(ticks) == turns(1, SMALL) == 3


def test_an_embedding_that_is_looked_up_is_not_read() -> None:
    model = make_llama()
    table = model.config.vocab_size * model.config.hidden_size
    assert read_params(model) == model.num_parameters() - table
    tied = make_llama(tie_word_embeddings=True)
    assert read_params(tied) == tied.num_parameters()


def test_the_peak_holds_the_weights() -> None:
    model = make_llama()
    speed = measure_speed({"model": model}, SMALL)["model"]
    assert speed.weights == 4 * model.num_parameters()
    assert speed.peak is None or speed.peak >= speed.weights


def test_a_table_of_positions_that_is_too_short() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=1, n_head=4)).eval()
    with pytest.raises(InputError, match=r"bench: prompt and generated tokens: 65 tokens, but .* positions for 64"):
        measure_speed({"model": model}, Workload(prompt=60, tokens=5))
    measure_speed({"model": model}, Workload(prompt=60, tokens=4, repetitions=1, warm_up=0))


def test_a_spread() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, (3.0,))
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, (5.0, 1.0, 3.0, 2.0, 4.0))
