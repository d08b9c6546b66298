"""What starting up imports: commands and public names wait with what is heavy until it is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import flapkit

LIGHT = ("torch", "transformers", "numpy")
HEAVY = (
    "transformers.modeling_utils",
    "torch.distributed.tensor",
    "torch._dynamo",
    "accelerate",
    "datasets",
    "lightning",
    "lm_eval",
    "peft",
    "pyarrow",
)
TYPO = "model: builtin:tiny-llama\ncalibrationn: {dataset: wikitext2}\nbudget: {ratio: 0.2}\noutput: out\n"


def python(source: str, folder=None) -> str:
    """Run Python code in a process of its own, and return what it prints."""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(commands: list[str], modules: tuple[str, ...], folder) -> dict[str, list[str]]:
    """Run commands one after the other in a process: each one, and which of the modules are imported behind it."""
    shown = python(
        f"""
import json, sys
from flapkit.cli import main
for command in {commands!r}:
    sys.argv = ["flapkit", *command.split()]
    try:
        main()
    except SystemExit:
        pass
    print("imported:", json.dumps([command, sorted(set({modules!r}) & set(sys.modules))]))
""",
        folder,
    )
    return dict(json.loads(line.split(":", 1)[1]) for line in shown.splitlines() if line.startswith("imported:"))


def test_help_imports_nothing_heavy(tmp_path):
    commands = ["--help", "--version", "run --help", ""]
    assert imported(commands, LIGHT, tmp_path) == {command: [] for command in commands}


def test_completion_imports_nothing_heavy(tmp_path):
    source = """
import os, sys
os.environ |= {"_FLAPKIT_COMPLETE": "complete_bash", "COMP_WORDS": "flapkit ru", "COMP_CWORD": "1"}
sys.argv = ["flapkit"]
from flapkit.cli import app
try:
    app(prog_name="flapkit")
except SystemExit:
    pass
print("imported:", sorted({"torch", "transformers"} & set(sys.modules)))
"""
    assert python(source, tmp_path) == "run\nimported: []\n"


def test_lists_and_mistakes_import_no_models(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TYPO)
    (tmp_path / "sweep.yaml").write_text(TYPO)
    commands = ["check recipe.yaml", "run recipe.yaml", "sweep sweep.yaml"]
    assert imported(commands, ("transformers", *HEAVY), tmp_path) == {command: [] for command in commands}
    assert imported(["list"], HEAVY, tmp_path) == {"list": []}


def test_show_imports_no_trainer(pruned_folder):
    heavy = ("lightning", "torchmetrics", "matplotlib", "datasets", "peft")
    command = f"show {pruned_folder}"
    assert imported([command], heavy, pruned_folder.parent) == {command: []}


def test_the_import_itself_is_light():
    source = f"import sys, flapkit; print(sorted(set({LIGHT!r}) & set(sys.modules)))"
    assert python(source) == "[]\n"


def test_public_names():
    assert flapkit.__version__ == version("flapkit")
    assert set(flapkit.__all__) <= set(dir(flapkit))
    assert all(getattr(flapkit, name) is not None for name in flapkit.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'prune'"):
        flapkit.prune  # noqa: B018 - the lookup is the test


@pytest.mark.parametrize(
    "imports",
    [
        "import flapkit\nfrom transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM\nimport flapkit",
        "import transformers\nimport flapkit\nfrom transformers import AutoModelForCausalLM, AutoConfig",
    ],
)
def test_the_auto_classes_load_pruned_checkpoints_whatever_is_imported_first(imports, pruned_folder):
    folder = str(pruned_folder)
    source = f"""{imports}
print(type(AutoConfig.from_pretrained({folder!r})).__name__)
print(type(AutoModelForCausalLM.from_pretrained({folder!r})).__name__)
"""
    assert python(source).split() == ["FlapkitLlamaConfig", "FlapkitLlamaForCausalLM"]


def test_the_configuration_alone(pruned_folder):
    source = f"import flapkit\nfrom transformers import AutoConfig\nAutoConfig.from_pretrained({str(pruned_folder)!r})"
    assert python(source) == ""
