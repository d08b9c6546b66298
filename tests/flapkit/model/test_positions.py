"""A model takes as many tokens as its table of positions has rows, and not one more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_llama
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import flapkit
from flapkit.api import PruneOptions
from flapkit.execution.executor import CalibrationText
from flapkit.model.empty import skeleton
from flapkit.model.positions import check_lengths, context_length, table_length
from flapkit.system.errors import InputError

TABLE = 16
GPT = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
USUAL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

TABLES: dict[str, dict[str, Any]] = {
    "gpt2": {**GPT, "n_positions": TABLE},
    "gptj": {**GPT, "n_positions": TABLE, "rotary_dim": 4},
    "gpt_neo": {
        **{**USUAL, "num_heads": 2, "num_layers": 1, "attention_types": [[["global"], 1]], "window_size": 4},
        "max_position_embeddings": TABLE,
    },
    "opt": {**USUAL, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": TABLE},
    "biogpt": {**USUAL, "intermediate_size": 24, "max_position_embeddings": TABLE},
    "mpt": {"vocab_size": 32, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": TABLE},
    # Two rows of its table are for padding.
    "roberta": {**USUAL, "intermediate_size": 24, "max_position_embeddings": TABLE + 2, "is_decoder": True},
}


@pytest.mark.parametrize("of", TABLES)
def test_a_table_ends_where_the_model_does(of):
    config = AutoConfig.for_model(of, **TABLES[of])
    model = AutoModelForCausalLM.from_config(config).eval()
    assert table_length(model) == table_length(skeleton(config)) == TABLE
    with torch.no_grad():
        model(torch.full((1, TABLE), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, TABLE + 1), 5))


def test_computed_positions_have_no_end():
    model = make_llama(max_position_embeddings=TABLE)
    assert table_length(model) is None
    model(torch.full((1, 2 * TABLE), 5))


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({}, 64),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}, 64),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 64),
    ],
)
def test_the_context_is_the_configurations_with_its_scaling(rope, length):
    if rope.get("rope_type") == "llama3":
        rope = {**rope, "original_max_position_embeddings": 32}
    parameters = {"rope_type": "default", "rope_theta": 10000.0, **rope}
    assert context_length(LlamaConfig(max_position_embeddings=64, rope_parameters=parameters)) == length


def test_beyond_a_table_is_refused_and_beyond_the_context_warned_of(caplog):
    caplog.set_level("WARNING", "flapkit")
    check_lengths(make_llama(), {"calibration.length": 64})
    assert not caplog.records
    check_lengths(make_llama(), {"calibration.length": 65})
    assert "calibration.length: 65 tokens, but the model was made for 64" in caplog.text
    empty = skeleton(AutoConfig.for_model("gpt2", **TABLES["gpt2"]))
    check_lengths(empty, {"calibration.length": TABLE})
    with pytest.raises(InputError, match=r"calibration.length: 17 tokens, but .* has positions for 16 only; use 16 or"):
        check_lengths(empty, {"calibration.length": TABLE + 1})


def test_pruning_from_python_is_refused_before_it_starts():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **TABLES["gpt2"])).eval()
    before = model.num_parameters()
    with pytest.raises(InputError, match="calibration: 17 tokens"):
        flapkit.prune_(model, torch.ones(4, TABLE + 1, dtype=torch.long), ratio=0.3)
    assert model.num_parameters() == before


@pytest.mark.parametrize("position", [0, 3])
def test_a_datasets_longest_window_counts(position):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **TABLES["gpt2"])).eval()
    rows = [{"input_ids": torch.ones(TABLE, dtype=torch.long)} for _ in range(4)]
    CalibrationText(rows, batch_size=1).check(model)
    rows[position] = {"input_ids": torch.ones(TABLE + 1, dtype=torch.long)}
    before = model.num_parameters()
    with pytest.raises(InputError, match="calibration: 17 tokens"):
        flapkit.prune_(model, rows, ratio=0.3, options=PruneOptions(batch_size=1))
    assert model.num_parameters() == before
