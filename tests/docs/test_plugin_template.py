"""The template is built, installed and used as a third party would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TEMPLATE = Path(__file__).parents[2] / "docs" / "plugin-template"
SCRIPT = """
import torch
import flapkit
from flapkit.registry import METRIC, Registry
print(Registry.load().origin(METRIC, "mean_output"))
model = flapkit.load("builtin:tiny-llama", "float32")
plan = flapkit.prune_(model, torch.arange(256).view(8, 32), metric="mean_output", ratio=0.2)
print(plan.removed_params(flapkit.sites(flapkit.load("builtin:tiny-llama"))))
"""


def call(*arguments: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_is_built_installed_and_used(tmp_path):
    shutil.copytree(TEMPLATE, tmp_path / "template")
    call("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist", cwd=tmp_path / "template")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site = tmp_path / "site"
    call("-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    origin, removed = call("-c", SCRIPT, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert origin == "flapkit-plugin-template 0.1.0"
    assert 0.19 < int(removed) / 2_654_208 <= 0.2
