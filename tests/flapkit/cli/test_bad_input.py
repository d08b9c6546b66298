"""Bad input through the command line: one clear message, exit code 2, nothing written, never a traceback."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import recipe_text, write_recipe

from flapkit.checkpoint.bundled import bundled_models


def recipe_of(model: str = "builtin:tiny-llama") -> str:
    return recipe_text(model={"path": model}, evaluate={})


RECIPE = recipe_of()


@pytest.fixture
def refused(home, command):
    def run(recipe: str | bytes, message: str, code: int = 2) -> None:
        before = sorted(home.rglob("*"))
        path = home / "recipe.yaml"
        path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
        ended, _, printed = command("run", "recipe.yaml")
        assert message in printed
        assert "Traceback" not in printed
        assert ended == code
        path.unlink()
        assert sorted(home.rglob("*")) == before

    return run


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("", "recipe.yaml:1:1: the recipe is empty"),
        ("model: [", "not YAML"),
        ("a plain sentence", "a recipe is a section of keys"),
        (b"model: \xff", "not UTF-8"),
        (RECIPE + "output: again\n", f"recipe.yaml:{len(RECIPE.splitlines()) + 1}:1: output: repeated key"),
        (RECIPE.replace("samples: 8", "samples: many"), "calibration.samples: expected a whole number, got 'many'"),
        (RECIPE.replace("samples: 8", "samples: 1e-4"), "calibration.samples: expected a whole number, got 0.0001"),
        (RECIPE.replace("samples: 8", "samples: no"), "calibration.samples: expected a whole number, got 'no'"),
        (RECIPE.replace("ratio: 0.2", "ratio: 20"), "give the fraction to remove, between 0 and 1, for example 0.2"),
    ],
)
def test_recipes(refused, recipe, message):
    refused(recipe, message)


def test_all_mistakes_at_once(refused):
    refused("modle: {path: m}\nmetric: wifw\ncalibration: {dataset: d}\nbudget: {ratio: 2}\noutput: 3\n", "wifv")


def model(home: Path) -> Path:
    folder = home / "model"
    shutil.copytree(bundled_models()["tiny-llama"], folder)
    return folder


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def corrupt(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, "the folder has no weights"),
        (truncated, "model.safetensors is damaged or incomplete"),
        (corrupt, "model.safetensors is damaged or incomplete"),
    ],
)
def test_models(refused, home, damage, message):
    damage(model(home))
    refused(recipe_of("./model"), message)


def test_disk_full(refused, home, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(RECIPE, "out: the disk is full")


def test_a_tokenizer_that_does_not_fit(refused, home):
    folder = model(home)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"vocab_size": 2048', '"vocab_size": 100'))
    refused(recipe_of("./model"), "the tokenizer does not fit the model")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped(home, sent):
    """A real signal, while calibration runs in a process of its own."""
    recipe = RECIPE.replace("samples: 8", "samples: 20000")
    (home / "recipe.yaml").write_text(recipe)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLAPKIT_CACHE": str(home / "cache")}
    process = subprocess.Popen(
        [sys.executable, "-m", "flapkit", "run", "recipe.yaml"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        # Where the tests run in the background, a shell has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    said = ""
    while "calibrate" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    time.sleep(2)
    process.send_signal(sent)
    said += process.communicate(timeout=60)[1]
    assert process.returncode == (130 if sent is signal.SIGINT else -signal.SIGKILL), said
    assert "Traceback" not in said
    assert not (home / "out").exists()


def test_a_traceback_is_shown_with_verbose_only(command, home, caplog):
    """A mistake of a plugin's author, found when the plugin is imported, and when it runs."""
    metric = """
from dataclasses import dataclass
from flapkit import hookimpl
from flapkit.interfaces import ImportanceMetric

@dataclass(frozen=True)
class Mine(ImportanceMetric):
    name = "mine"
    def score(self, site, stats, weight):
        return the_missing_name

@hookimpl
def flapkit_metrics():
    return [Mine]
"""
    for content, message in (
        (metric, "metric 'mine' at layers.0.attention: NameError"),
        ("1 / 0", "ZeroDivisionError"),
    ):
        (home / "mine.py").write_text(content)
        recipe = write_recipe(home, plugins=["./mine.py"], metric="mine")
        code, _, err = command("run", recipe, "--overwrite")
        assert code == 2
        assert "Traceback" not in err + caplog.text
        code, _, verbose = command("run", recipe, "--overwrite", "--verbose")
        assert code == 2
        assert "Traceback" in caplog.text
        assert 'mine.py", line ' in caplog.text
        caplog.clear()
        # The line is the same, and comes last.
        assert verbose.splitlines()[-1] == err.splitlines()[-1]
        assert message in err
