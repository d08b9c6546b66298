"""The table of compensators: its figures are of runs, and what is known is not run again."""

from __future__ import annotations

import json
import subprocess

import pytest
import yaml
from benchmarks.compensation import main
from conftest import write_recipe

LORA = "{name: lora, steps: 2, validate_every: 1, validation_windows: 2, length: 32}"


@pytest.mark.slow
def test_figures_are_of_runs_and_none_is_run_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, factor in (("train.txt", 3), ("test.txt", 5)):
        (tmp_path / name).write_text(
            "".join(f"def f{n}(model):\n    return model * {factor * n}\n" for n in range(400))
        )
    evaluate = {"perplexity": [{"dataset": "test.txt", "length": 32, "windows": 4}]}
    write_recipe(tmp_path, calibration={"dataset": "train.txt", "samples": 8, "length": 32}, evaluate=evaluate)
    asked = ["recipe.yaml", "rows", "--ratios", "0.3", "--lora", LORA, "--set", "calibration.samples=9", "--ways"]
    main([*asked, "none", "bias + LoRA"])
    table = capsys.readouterr().out
    written = tmp_path / "rows" / "30-wifv-bias-+-LoRA"
    recipe = yaml.safe_load((written / "recipe.yaml").read_text())
    assert recipe["compensator"][0] == "bias"
    assert recipe["compensator"][1]["steps"] == 2
    assert recipe["calibration"]["samples"] == 9
    (measured,) = json.loads((written / "result.json").read_text())["perplexity"].values()
    assert f"| `wifv` | bias + LoRA | {measured['recovered']:.3f} |" in table
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("was run again"))
    main([*asked, "none", "bias + LoRA"])
    assert capsys.readouterr().out == table
    with pytest.raises(pytest.fail.Exception, match="was run again"):
        main([*asked, "bias + LoRA", "--lora", LORA.replace("2", "3", 1)])
