"""What a run writes to be published names files, and no folders of the machine that it ran on."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import yaml
from conftest import write_recipe

from flapkit.checkpoint.folder import LOCAL_RECIPE
from flapkit.checkpoint.load import load_tokenizer
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.recipe.load import load_recipe
from flapkit.system.paths import name_only, names_only, without_folders

PLUGIN = """
from dataclasses import dataclass
from flapkit import hookimpl
from flapkit.interfaces import ImportanceMetric

@dataclass(frozen=True)
class Mine(ImportanceMetric):
    name = "mine"
    def score(self, site, stats, weight):
        return weight.abs().sum(dim=0).view(site.units, -1)

@hookimpl
def flapkit_metrics():
    return [Mine]
"""
LICENCE = "---\nlicense: apache-2.0\n---\n"


def run_absolute(command, home: Path, **changes) -> tuple[Path, Path]:
    """Run a recipe that names everything by its whole path; return the recipe and the output."""
    tokenizer = load_tokenizer("builtin:tiny-llama")
    tiny_model(tiny_config("llama", vocab_size=len(tokenizer))).save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    (home / "model" / "README.md").write_text(LICENCE)
    (home / "mine.py").write_text(PLUGIN)
    text = {"dataset": str(home / "text.txt"), "length": 32}
    samples = {"prompts": ["/usr/bin/env python"], "tokens": 2}
    recipe = write_recipe(
        home,
        model={"path": str(home / "model"), "dtype": "float32"},
        plugins=[str(home / "mine.py")],
        metric="mine",
        calibration={**text, "samples": 8},
        evaluate={"perplexity": [{**text, "windows": 4}], "samples": samples},
        trainer={"accelerator": "cpu", "logger": ["csv"]},
        output=str(home / "out"),
        **changes,
    )
    code, _, err = command("run", recipe, "-q")
    assert code == 0, err
    return recipe, home / "out"


def folders_in(output: Path) -> dict[str, str]:
    """Find files that hold the path of the home or the temporary folder."""
    names = (str(Path.home()), tempfile.gettempdir())
    files = [path for path in output.rglob("*") if path.is_file() and path.name != LOCAL_RECIPE]
    return {str(path): name for path in files for name in names if name.encode() in path.read_bytes()}


def test_an_output_names_no_folders(command, home):
    recipe, output = run_absolute(command, home, export=["hf", {"name": "hf-stock", "pad": True}])
    assert folders_in(output) == {}
    # Where the run warns of a text, and where its licence is read, it knows the whole paths.
    assert any(
        warning.startswith("text.txt, 32") for warning in json.loads((output / "result.json").read_text())["warnings"]
    )
    assert "license: apache-2.0" in (output / "README.md").read_text()
    published = yaml.safe_load((output / "recipe.yaml").read_text())
    assert (published["model"]["path"], published["plugins"], published["output"]) == ("model", ["mine.py"], "out")
    assert published["evaluate"]["samples"]["prompts"] == ["/usr/bin/env python"]
    assert load_recipe(output / LOCAL_RECIPE).recipe == load_recipe(recipe).recipe
    assert not list((output / "exports").rglob(LOCAL_RECIPE))
    code, _, err = command("evaluate", output)
    assert code == 0, err


def test_a_recovered_output_names_no_folders(command, home):
    (home / "other.txt").write_text("def other():\n    return 1\n" * 100)
    lora = {"name": "lora", "rank": 2, "steps": 2, "length": 32, "merge": False, "dataset": str(home / "other.txt")}
    _, output = run_absolute(command, home, compensator=["bias", lora])
    assert folders_in(output) == {}
    assert "license: apache-2.0" in (output / "README.md").read_text()
    assert json.loads((output / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "out"
    code, _, err = command("recover", output, "--set", "output=again", "-q")
    assert code == 0, err
    assert folders_in(home / "again") == {}


def test_a_recipe_without_folders_is_written_once(command, home):
    assert command("run", write_recipe(home), "-q")[0] == 0
    assert not (home / "out" / LOCAL_RECIPE).exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/llama", "llama"),
        ("~/llama/", "llama"),
        ("../text.txt", "text.txt"),
        ("sqlite:////data/trials.db", "sqlite:///trials.db"),
        ("sqlite:///trials.db", "sqlite:///trials.db"),
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b"),
        ("./text.txt", "./text.txt"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_name_only(text, expected):
    assert name_only(text) == expected
    assert names_only({"a": [text], "prompts": [text]}) == {"a": [expected], "prompts": [text]}


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("file /home/me/x.txt, 3 rows", "file x.txt, 3 rows"),
        ("'~/a/b.json' is damaged", "'b.json' is damaged"),
        (
            "see https://hub.co/a/b and owner/name, 3 / 4, and/or",
            "see https://hub.co/a/b and owner/name, 3 / 4, and/or",
        ),
    ],
)
def test_sentences(sentence, expected):
    assert without_folders(sentence) == expected
