"""``flapkit export``, and a recipe's ``export``."""

from __future__ import annotations

import json

import pytest
from conftest import write_recipe


def test_export(command, pruned_folder, tmp_path):
    code, out, err = command("export", pruned_folder, "--to", "hf", "--output", "out", "--set", "dtype=bfloat16")
    assert code == 0, err
    assert "logits of 64 tokens agree" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    code, out, _ = command("export", pruned_folder, "--to", "hf", "-o", "again", "--no-verify")
    assert (code, "not verified" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguff"], "unknown exporter 'gguff'"),
        (["--to", "hf", "--set", "dtype=int3"], "option 'dtype'"),
        (["--to", "hf", "--set", "dtyp=float16"], "did you mean 'dtype'"),
        (["--to", "hf", "--set", "dtype"], "expected option=value"),
        (["--to", "hf", "--set", "dtype=["], "--set dtype=[: not YAML"),
        (["--to", "hf", "--set", "dtype=" + "9" * 5000], "option 'dtype'"),
        (["--to", "hf", "--set", "dtype=&a x"], "anchors such as &a are not supported"),
    ],
)
def test_bad_input(command, pruned_folder, tmp_path, arguments, message):
    code, _, err = command("export", pruned_folder, *arguments, "--output", "out")
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_checkpoint(command, tmp_path):
    code, _, err = command("export", tmp_path, "--to", "hf", "--output", "out")
    assert code == 2
    assert "has no config.json" in err


def test_a_recipe_exports(command, tmp_path):
    write_recipe(tmp_path, evaluate={}, export=["hf"])
    code, out, err = command("run", "recipe.yaml")
    assert code == 0, err
    assert "exports/hf: logits of 64 tokens agree" in out
    assert (tmp_path / "out" / "exports" / "hf" / "config.json").is_file()
    assert "exporter" not in (tmp_path / "out" / "recipe.yaml").read_text()
    code, _, err = command("run", "recipe.yaml", "--set", "export=[hf, {name: hf, dtype: bfloat16}]", "--overwrite")
    assert code == 2
    assert "listed twice" in err
    code, _, err = command("check", "recipe.yaml", "--set", "export=[hf, hg]", "--overwrite")
    assert code == 2
    assert "export.1: unknown exporter 'hg'" in err


def test_odd_widths_are_warned_of_and_rounded(command, tmp_path):
    write_recipe(tmp_path, evaluate={})
    code, out, err = command("check", "recipe.yaml")
    assert code == 0, err
    assert "is not a multiple of 32" in out
    code, _, err = command("run", "recipe.yaml")
    assert code == 0
    warned = json.loads((tmp_path / "out" / "result.json").read_text())["warnings"]
    assert any("is not a multiple of 32" in text for text in warned)
    code, out, err = command("run", "recipe.yaml", "--set", "budget.multiple_of=32", "--overwrite")
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    whole = config["intermediate_size"]
    widths = [layer.get("intermediate_size", whole) for layer in config["per_layer_config"].values()]
    assert all(width % 32 == 0 for width in widths)
    assert min(widths) < whole
    assert not json.loads((tmp_path / "out" / "result.json").read_text())["warnings"]
