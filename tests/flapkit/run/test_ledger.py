"""What a budget asked for and what a run got: in the command's table, result.json and the report, and on the disk."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import write_recipe
from safetensors.torch import load_file

import flapkit


@pytest.fixture
def ran(command, home):
    """Run a budget, and return what the command printed and the run's costs."""

    def run(**budget):
        small = {"calibration": {"dataset": "text.txt", "samples": 4, "length": 32}, "evaluate": {}}
        path = write_recipe(home, budget=budget, report={"error_windows": 0}, **small)
        code, out, err = command("run", path)
        assert code == 0, err
        return out, {row["measure"]: row for row in json.loads((home / "out" / "result.json").read_text())["costs"]}

    return run


def test_memory_is_what_the_file_has(ran, home):
    out, costs = ran(memory="10MB")
    held = sum(tensor.nbytes for tensor in load_file(home / "out" / "model.safetensors").values())
    assert held == costs["memory"]["pruned"]
    assert costs["memory"]["asked"] == 10**7
    model = flapkit.load(home / "out")
    assert costs["params"]["pruned"] == model.num_parameters()
    unit = 4 * max(site.params_per_unit for site in flapkit.sites(model))
    assert 0 <= 10**7 - held < unit
    assert re.search(r"weights, MB \(float32\), at most 10\.0 +[0-9.]+ +(9\.9|10\.0)", out), out
    page = (home / "out" / "report.html").read_text()
    assert "<code>memory: 10MB</code>" in page
    assert "budget, at most" in page


def test_the_cache_is_what_the_model_fills(ran, home):
    _, costs = ran(kv_cache=0.5)
    model = flapkit.load(home / "out")
    cache = model(torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 10 * costs["kv_cache"]["pruned"]
    assert costs["kv_cache"]["pruned"] <= 0.5 * costs["kv_cache"]["dense"] == costs["kv_cache"]["asked"]
