"""A run's files as tests of the report need them, made without a model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from conftest import recipe_text

from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Coupling, Site
from flapkit.pruning.ranking import remove_lowest
from flapkit.pruning.site_errors import SiteError
from flapkit.run.report.document import RunDocument
from flapkit.run.report.report_record import SampleRecord, make_record


def make_sites(layers: int = 3) -> list[Site]:
    """Attention of four KV heads with two query heads each, and MLPs of 48 channels."""
    sites = []
    for layer in range(layers):
        attention = (Coupling("q", 0, 8, 32), Coupling("k", 0, 4, 32))
        sites.append(
            Site(f"layers.{layer}.attention", layer, "attention", f"o{layer}", 4, 8, 32, attention, heads=8, kv_heads=4)
        )
        sites.append(Site(f"layers.{layer}.mlp", layer, "mlp", f"d{layer}", 48, 1, 32, (Coupling("g", 0, 1, 64),)))
    return sites


def make_scores(sites: list[Site]) -> dict[str, torch.Tensor]:
    """Scores over three decades."""
    torch.manual_seed(0)
    return {site.name: torch.randn(site.units, site.channels_per_unit).mul(1.5).exp().double() for site in sites}


def make_run(name: str = "run", ratio: float = 0.3, layers: int = 3, tasks: bool = True, **changes) -> RunDocument:
    """A whole run: random scores, plausible figures."""
    sites = make_sites(layers)
    scores = make_scores(sites)
    budget = Budget.over(sites, ratio)
    plan: PruningPlan = remove_lowest(sites, {site: score.mean(dim=1) for site, score in scores.items()}, budget)
    errors = {
        site.name: SiteError(0.2 + 0.01 * site.layer, 0.21, 0.3)
        for site in sites
        if len(plan.keep[site.name]) < site.units
    }
    record = make_record(
        "models/tiny",
        sites,
        scores,
        plan,
        budget,
        errors=errors,
        error_tokens=512,
        samples=[SampleRecord("Once upon", " a time there was", " a time they went")],
    )
    blocks, removed = sum(site.params for site in sites), plan.removed_params(sites)
    both = {"dense": {"value": 0.6, "stderr": 0.01}, "pruned": {"value": 0.55, "stderr": 0.02}}
    result = {
        "params": {
            "dense": blocks + 1000,
            "pruned": blocks + 1000 - removed + 96,
            "blocks": blocks,
            "removed": removed,
        },
        "perplexity": {"text, 128 tokens": {"dense": 4.0, "pruned": 5.0}},
        "seconds": {"load": 1.5, "calibrate": 75.0},
        "warnings": ["site layers.0: `bias` was used"],
    }
    if tasks:
        result["zero_shot"] = {"boolq": {"items": 100, "metrics": {"acc": {**both, "paired": {"p_value": 0.03}}}}}
    kinds = ("metric", "searcher", "compensator")
    made = {kind: {"name": name} for kind, name in zip(kinds, ("wifv", "al_am", "bias"), strict=True)}
    made["calibration"] = {"tokens_sha256": "ab" * 32}
    return RunDocument(name, record, {**result, **changes}, recipe_text(), made)


TRIALS = {"objective": "kl", "trials": 9, "best_trial": 7, "values": {"1": 1.5, "2": None, "5": 1.75, "7": 1.25}}
TRAINING = {
    "best_step": 2,
    "steps": 3,
    "training_loss": {"1": 1.5, "2": 1.25, "3": 1.0},
    "validation_loss": {"0": 20.0, "2": 1.0, "3": 1.5},
}
"""The course of a search by trials, and by training, as in ``result.json``."""


def run_without_flapkit(script: str, folders: Sequence[Path]) -> None:
    """Run a script in a process of its own, with folders as its arguments; it must succeed."""
    parent = folders[0].parent
    done = subprocess.run(
        [sys.executable, "-c", script, *folders],
        cwd=parent,
        env={**os.environ, "HF_HOME": str(parent / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
