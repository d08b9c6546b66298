"""Tables of block timings: what is fitted, where it is stored, and the budget that it serves."""

from __future__ import annotations

import json

import pytest
from conftest import make_llama, write_recipe

import flapkit
from flapkit.evaluation.block_table import find_times
from flapkit.evaluation.speed import Seconds, Workload
from flapkit.run import block_times
from flapkit.run.block_times import time_blocks
from flapkit.system.errors import BudgetError, InputError

SMALL = Workload(prompt=8, tokens=2, repetitions=3, warm_up=0)


@pytest.fixture
def clock(monkeypatch):
    """Let time pass by a rule: 10 s, 1 s for each key/value head and 0.1 s for each neuron; then a slow half of all."""

    def passed(models, prompts, workload, tick):
        def seconds(model):
            layers = model.model.layers
            heads = sum(layer.self_attn.k_proj.out_features // layer.self_attn.head_dim for layer in layers)
            return 10 + heads + 0.1 * sum(layer.mlp.down_proj.in_features for layer in layers)

        # The machine gets slower from turn to turn, for both models alike.
        slow = (1.0, 1.5, 3.0)
        return {name: [Seconds(s * seconds(m), 0.0, 2 * s * seconds(m)) for s in slow] for name, m in models.items()}

    monkeypatch.setattr(block_times, "time_in_turns", passed)


@pytest.fixture
def dense(tmp_path):
    model = make_llama(num_key_value_heads=4)
    model.save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense"), flapkit.sites(model)


def test_a_linear_clock_is_recovered(clock, dense):
    path, sites = dense
    table = time_blocks(path, SMALL)
    assert find_times(sites, path, 1, 8) == table
    total = 10 + 2 * 4 + 0.1 * 2 * 40
    for phase in ("prefill", "decode"):
        times = table.phases[phase]
        # The median turn is the slower by a half.
        assert times.total == pytest.approx(1.5 * total)
        assert times.units["layers.1.attention"] == pytest.approx(1.5 * 1.0)
        assert times.units["layers.0.mlp"] == pytest.approx(1.5 * 0.1)
        assert times.predicted == pytest.approx(times.measured)
    cost = table.cost("decode")
    assert cost.total == pytest.approx(1.5e12 * total)
    assert cost.say(cost.total) == "39,000.000 ms of time"


def test_a_table_that_is_missing_or_damaged(dense, clock, cache):
    path, sites = dense
    with pytest.raises(BudgetError, match=rf"run `flapkit bench {path} --blocks --batch-size 2 --prompt 8` first"):
        find_times(sites, path, 2, 8)
    time_blocks(path, SMALL)
    (file,) = (cache / "block-times").iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "prompt": "8"}))
    with pytest.raises(InputError, match="run `flapkit bench --blocks` again"):
        find_times(sites, path, 1, 8)


def test_a_budget_of_time(command, home, clock):
    bench = ("bench", "builtin:tiny-llama", "--blocks", "--prompt", "8", "--tokens", "2", "--repetitions", "3")
    small = {"evaluate": {}, "report": {"error_windows": 0}}
    path = write_recipe(home, budget={"latency": 0.7, "on": "prefill", "prompt": 8}, **small)
    code, _, err = command("run", path)
    assert (code, "run `flapkit bench builtin:tiny-llama --blocks --prompt 8` first" in err) == (2, True)
    assert command(*bench, "--compile")[0] == 2
    code, out, _ = command(*bench)
    assert code == 0
    assert "us per unit of mlp" in out
    code, out, err = command("run", path)
    assert code == 0, err
    assert "time by the table, ms (prefill, batch 1, prompt 8, float16), at most" in out
    (row,) = (r for r in json.loads((home / "out" / "result.json").read_text())["costs"] if r["measure"] == "latency")
    assert 0.695 < row["pruned"] / row["dense"] <= 0.7
