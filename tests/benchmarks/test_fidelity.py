"""The comparison with the released code runs, and finds what there is to find, on a model of no account."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from benchmarks.fidelity import BASELINES, Bench, Case, differing, inputs_of, main, released_fluctuation
from conftest import make_llama

import flapkit
from flapkit.model.plan import PruningPlan

CASES = [("flap", "WIFV", "AL-AM"), ("flap", "IFV", "UL-MM"), *((name, None, None) for name in BASELINES)]


@pytest.fixture
def oracle(tmp_path):
    """Outputs of released code that is played by the script's own quirks."""
    model = make_llama()
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, 96, (12, 16), generator=torch.Generator().manual_seed(1))
    for name in ("calibration_tokens", "eval_tokens"):
        np.save(tmp_path / f"{name}.npy", tokens.numpy().astype(np.int16))
    stored = {}
    for name, inputs in inputs_of(model, flapkit.sites(model), tokens).items():
        _, layer, kind = name.split(".")
        place = f"{'attn' if kind == 'attention' else 'mlp'}.{layer}"
        stored[f"fluc_inp.{place}"] = (released_fluctuation(inputs) * 16).float().numpy()
        stored[f"scaler_inp.{place}"] = inputs.square().mean(dim=(0, 1)).numpy() * 16
    np.savez(tmp_path / "released_statistics.npz", **stored)
    bench, entries = Bench(tmp_path, str(tmp_path / "model")), []
    for method, metric, structure in CASES:
        entry = {"name": f"{method}-{structure}", "method": method, "metric": metric, "structure": structure}
        entry |= {"ratio": 0.4, "remove_heads": 2, "perplexity": 1.0, "heads": [[], []], "neurons": [[], []]}
        case = Case.of(entry)
        plan = bench.as_released(case, bench.released)
        entry |= {
            key: [plan.keep[f"layers.{i}.{kind}"] for i in range(2)]
            for kind, key in (("attention", "heads"), ("mlp", "neurons"))
        }
        entries.append({**entry, "perplexity": bench.perplexity(case, plan)})
    (tmp_path / "released_code.json").write_text(json.dumps({"dense_perplexity": 1.0, "cases": entries}))
    return tmp_path


def test_every_difference_is_explained(oracle, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fidelity.py", str(oracle), str(oracle / "model")])
    main()
    rows = [
        row.split(" | ")
        for row in capsys.readouterr().out.splitlines()
        if row.startswith(("| flap", "| mag", "| wanda"))
    ]
    assert len(rows) == len(CASES)
    assert all(row[-1].rstrip(" |") == "0" for row in rows)
    assert any(int(row[5]) for row in rows)


def test_differences_are_counted():
    one, other = PruningPlan({"a": (0, 1, 2), "b": (0,)}), PruningPlan({"a": (0, 3), "b": (0,)})
    assert differing(one, other) == 3
