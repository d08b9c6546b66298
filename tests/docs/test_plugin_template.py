"""The template is built, installed and used as a third party would."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

from conftest import make_llama

import flapkit
from flapkit.registry import METRIC, Registry

TEMPLATE = Path(__file__).parents[2] / "docs" / "plugin-template"


def test_is_built_installed_and_used(tmp_path, monkeypatch, tokens):
    """A wheel is installed by unpacking it."""
    shutil.copytree(TEMPLATE, tmp_path / "template")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    done = subprocess.run(build, cwd=tmp_path / "template", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr("flapkit.registry.entry_points", entry_points)
    assert Registry.load().origin(METRIC, "mean_output") == "flapkit-plugin-template 0.1.0"
    model = make_llama()
    sites = flapkit.sites(model)
    plan = flapkit.prune_(model, tokens, metric="mean_output", ratio=0.2)
    removed = plan.removed_params(sites) / sum(site.params for site in sites)
    assert 0.15 < removed <= 0.2
