"""A budget of every kind is met by what was saved: ``docs/measure_budgets.py``, the table of docs/budgets.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "measure_budgets.py"
NEURON = 576
"""Parameters of an MLP channel of the bundled model, its cheapest unit."""


@pytest.mark.slow
def test_saved_models_meet_their_budgets_to_within_one_unit(tmp_path):
    told = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    _, _, *rows = [line.strip("| \n").split(" | ") for line in told.splitlines() if line.startswith("|")]
    figures = {row[0].strip("`"): [cell.strip(" %").replace(",", "") for cell in row[2:]] for row in rows}
    kinds = {budget.strip("{").partition(":")[0]: cells for budget, cells in figures.items()}
    assert kinds.keys() == {"params", "ratio", "memory", "kv_cache"}
    _, asked, ledger, saved, _ = kinds["params"]
    assert ledger == saved
    assert 0 <= int(asked) - int(saved) < NEURON
    _, asked, ledger, saved, _ = kinds["kv_cache"]
    assert asked == ledger == saved
    _, asked, ledger, saved, _ = kinds["memory"]
    assert float(asked) >= float(ledger) == float(saved)
    assert kinds["ratio"][1] == "15.00"
    dense = int(kinds["params"][0])
    assert 0 <= 15 - float(kinds["ratio"][3]) < 100 * NEURON / dense + 0.005
