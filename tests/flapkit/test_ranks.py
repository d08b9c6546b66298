"""Two processes on the CPU prune as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """\
model: {path: builtin:tiny-llama, dtype: float32}
calibration: {dataset: text.txt, samples: 13, length: 32, batch_size: 2}
budget: {ratio: 0.2}
evaluate: {perplexity: [{dataset: text.txt, length: 32, windows: 9}]}
trainer: {accelerator: cpu, devices: DEVICES, strategy: STRATEGY}
output: OUTPUT
"""
DIES = """
import os
from dataclasses import dataclass
from flapkit import hookimpl
from flapkit.interfaces import ImportanceMetric

@dataclass(frozen=True)
class Dies(ImportanceMetric):
    name = "dies"

    def score(self, site, stats, weight):
        if os.environ.get("LOCAL_RANK") == "1":
            raise MemoryError("the second process is out of memory")
        return weight.abs().sum(dim=0).view(site.units, -1)

@hookimpl
def flapkit_metrics():
    return [Dies]
"""


def flapkit(home: Path, recipe: str, name: str) -> subprocess.CompletedProcess[str]:
    (home / name).write_text(recipe)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLAPKIT_CACHE": str(home / f"cache of {name}")}
    return subprocess.run(
        [sys.executable, "-m", "flapkit", "run", name],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@pytest.fixture
def home(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("".join(f"def f{n}(model):\n    return model * {n}\n" for n in range(400)))
    return tmp_path


@pytest.mark.slow
def test_two_processes_are_one(home):
    for devices, strategy, output in (("1", "auto", "one"), ("2", "ddp", "two")):
        asked = RECIPE.replace("DEVICES", devices).replace("STRATEGY", strategy).replace("OUTPUT", output)
        done = flapkit(home, asked, f"{output}.yaml")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("block parameters") == 1
    assert (home / "one" / "plan.json").read_bytes() == (home / "two" / "plan.json").read_bytes()
    one, two = (json.loads((home / name / "result.json").read_text())["perplexity"] for name in ("one", "two"))
    (one,), (two,) = one.values(), two.values()
    assert two["dense"] == pytest.approx(one["dense"], rel=1e-6)
    assert two["pruned"] == pytest.approx(one["pruned"], rel=1e-6)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(home):
    (home / "dies.py").write_text(DIES)
    asked = RECIPE.replace("DEVICES", "2").replace("STRATEGY", "ddp").replace("OUTPUT", "out")
    done = flapkit(home, asked + "metric: dies\nplugins: [./dies.py]\n", "dies.yaml")
    assert done.returncode != 0
    assert "the second process is out of memory" in done.stderr
    assert not (home / "out").exists()
