"""What starting up imports: commands and public names wait with what is heavy until it is needed."""

from __future__ import annotations

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


def imported(command: list[str], modules: tuple[str, ...], folder) -> str:
    """Run a command, and return its output and which of the modules it has imported."""
    return python(
        f"""
import sys
from flapkit.cli import main
sys.argv = ["flapkit", *{command!r}]
try:
    main()
except SystemExit:
    pass
print("imported:", sorted(set({modules!r}) & set(sys.modules)))
""",
        folder,
    )


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["run", "--help"], []])
def test_help_imports_nothing_heavy(command, tmp_path):
    assert imported(command, LIGHT, tmp_path).endswith("imported: []\n")


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


@pytest.mark.parametrize("command", ["list", "check recipe.yaml", "run recipe.yaml", "sweep sweep.yaml"])
def test_lists_and_mistakes_import_no_models(command, tmp_path):
    (tmp_path / "recipe.yaml").write_text(TYPO)
    (tmp_path / "sweep.yaml").write_text(TYPO)
    assert imported(command.split(), HEAVY, tmp_path).endswith("imported: []\n")


def test_show_imports_no_trainer(pruned_folder):
    heavy = ("lightning", "torchmetrics", "matplotlib", "datasets", "peft")
    assert imported(["show", str(pruned_folder)], heavy, pruned_folder.parent).endswith("imported: []\n")


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
