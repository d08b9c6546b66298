"""Run every check on the families that come with flapkit, and write the table: ``python docs/conformance.py``.

``python docs/conformance.py NAME ...`` repeats some. It takes minutes, so the table is not generated with the other
pages; ``make test-all`` runs the same checks.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from flapkit.testing import CHECKS, Outcome

PAGE = Path(__file__).parent / "families.md"
HEAD = """# Families

The families that come with flapkit, with the checks of `flapkit check-adapter`: tiny random models of each class, in
every form of the class, in float32 on a CPU (`python docs/conformance.py`). An error is the largest difference of a
logit between the sliced and the masked model, as a fraction of the largest logit; rounding in float32 explains up to
1e-5. Random weights verify shapes and exactness, not quality.

`query heads` is the error with `unit: query_head`, if the family supports it. `whole experts` is the error with
`expert_unit: expert` and `both`, and where channels of the remaining experts are removed afterwards.
"""
WITH_FIGURES = ("sliced is masked", "query heads", "whole experts", "constant channels", "bfloat16")
"""Checks whose worst figure is shown; the others show whether they passed."""


def measure(name: str) -> list[Outcome]:
    """Check one adapter."""
    import torch

    from flapkit.registry import ADAPTER, Registry
    from flapkit.testing import conformance

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return list(conformance(Registry.load().create(ADAPTER, name)))


def row(name: str, outcomes: Sequence[Outcome]) -> str:
    """Write a family's row: its forms, and for each check the worst figure or whether it passed."""
    forms = dict.fromkeys(outcome.form for outcome in outcomes)
    cells = [f"`{name}`", ", ".join(forms)]
    for check in CHECKS:
        results = [outcome for outcome in outcomes if outcome.check == check]
        if failed := [outcome for outcome in results if not outcome.passed]:
            cells.append(f"no: {failed[0].form}")
        elif check in WITH_FIGURES:
            cells.append(max((outcome.figure for outcome in results), key=_size))
        else:
            cells.append("yes")
    return f"| {' | '.join(cells)} |"


def _size(figure: str) -> float:
    try:
        return float(figure.split()[0])
    except ValueError:
        return -1.0


def main(names: Sequence[str]) -> None:
    """Check families, two at a time; the rows of the others stay."""
    from flapkit.registry import ADAPTER, Registry

    known = [name for name in Registry.load().names(ADAPTER) if name not in ("auto", "vicuna")]
    old = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    rows = {line.split("`")[1]: line for line in old if line.startswith("| `")}
    chosen = names or known
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for name, outcomes in zip(chosen, pool.map(measure, chosen), strict=True):
            rows[name] = row(name, outcomes)
            print(rows[name], flush=True)
    lines = [HEAD, f"| family | forms | {' | '.join(CHECKS)} |", f"|{'---|' * (len(CHECKS) + 2)}"]
    PAGE.write_text("\n".join([*lines, *(rows[name] for name in known)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
