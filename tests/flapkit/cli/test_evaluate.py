"""``flapkit evaluate`` and ``flapkit bench``, as a user types them."""

from __future__ import annotations

import json
import sys

import pytest
import yaml
from conftest import make_llama

from flapkit.cli import main

RECIPE = {
    "model": {"path": "builtin:tiny-llama", "dtype": "float32"},
    "calibration": {"dataset": "text.txt", "samples": 4, "length": 16},
    "budget": {"ratio": 0.3},
    "evaluate": {"perplexity": [{"dataset": "text.txt", "length": 16, "windows": 4}]},
    "trainer": {"accelerator": "cpu"},
    "output": "out",
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("def kept(model):\n    return model\n" * 50)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


@pytest.fixture
def flapkit(monkeypatch, capsys):
    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flapkit", *args])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_a_checkpoint_is_measured_as_its_run_measured_it(home, flapkit):
    assert flapkit("run", "recipe.yaml", "--quiet")[0] == 0
    ran = json.loads((home / "out" / "result.json").read_text())["perplexity"]
    code, out, _ = flapkit("evaluate", "out", "--against", "builtin:tiny-llama", "--json", "--output", "found.json")
    found = json.loads(out)
    assert (code, found) == (0, json.loads((home / "found.json").read_text()))
    for name, measured in ran.items():
        for key in ("dense", "pruned", "bits_per_byte", "protocol", "batch_size"):
            assert found["perplexity"][name][key] == measured[key]
    code, out, _ = flapkit("evaluate", "out")
    assert code == 0
    assert f"{ran['text.txt, 16 tokens']['pruned']:.3f}" in out


def test_what_is_to_be_measured_has_to_be_said(home, flapkit):
    code, _, error = flapkit("evaluate", "builtin:tiny-llama")
    assert code == 2
    assert "holds no recipe.yaml; say with --recipe" in error
    code, _, error = flapkit("evaluate", "builtin:tiny-llama", "--recipe", "recipe.yaml", "--set", "evaluate={}")
    assert code == 2
    assert "it asks for nothing" in error


def test_bench_prints_a_table_or_json(home, flapkit):
    make_llama().save_pretrained("small")
    small = ("bench", "small", "--prompt", "8", "--tokens", "2", "--repetitions", "1", "--device", "cpu")
    code, out, _ = flapkit(*small)
    assert code == 0
    assert "decode, tokens/s" in out
    assert "batch 1, prompt 8, then 2 tokens" in out
    code, out, _ = flapkit(*small, "--json")
    assert json.loads(out)["workload"]["prompt"] == 8
    assert json.loads(out)["promised"] is None


def test_a_file_that_exists_is_not_replaced(home, flapkit):
    (home / "found.json").write_text("mine")
    code, _, error = flapkit("bench", "builtin:tiny-llama", "--output", "found.json")
    assert code == 2
    assert "found.json: exists already" in error
    assert (home / "found.json").read_text() == "mine"
