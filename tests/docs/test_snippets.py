"""Every Python snippet of a page and of a model card runs as it stands, and asks for nothing.

They run on a pseudo-terminal, where transformers asks whether to run a model's code if a snippet does not say so.
"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_recipe

from flapkit.checkpoint.card import CARD

ROOT = Path(__file__).parents[2]

BEFORE = {
    "README.md: import flapkit": """
        import torch
        from flapkit.checkpoint.load import load_tokenizer
        model, tokenizer = flapkit.load("builtin:tiny-llama"), load_tokenizer("builtin:tiny-llama")
        calibration = torch.arange(256).view(8, 32)
    """,
    "docs/architectures.md: from pathlib import Path": "",
    "docs/cluster.md: model = flapkit": "",
    "docs/how-to/fine-tune.md: import flapkit": "",
    "docs/how-to/lightning.md: import flapkit": "",
    "docs/how-to/plot.md: import json": "",
    "docs/how-to/plot.md: import pandas": """
        import os
        os.makedirs("runs/sweeps/compare")
        columns = "metric,budget.ratio,perplexity.stdlib_heldout.128,perplexity.stdlib_heldout.128.dense,error"
        lines = [columns, "wifv,0.2,21.1,14.8,", "wifv,0.5,60.2,14.8,", "random,0.2,40.1,14.8,", "random,0.5,,,no"]
        open("runs/sweeps/compare/table.csv", "w").write("\\n".join(lines))
    """,
    "docs/how-to/remove-experts.md: flapkit.prune_": """
        from flapkit.model.tiny import tiny_config, tiny_model
        model, tokens = tiny_model(tiny_config("qwen3_moe")), torch.arange(96).view(8, 12)
    """,
    "docs/layerwise.md: from flapkit": """
        path, batches = "builtin:tiny-llama", [{"input_ids": torch.arange(64).view(2, 32)}]
    """,
    "docs/lora.md: import flapkit": "",
    "docs/run-the-model.md: from peft": "",
    "docs/run-the-model.md: from safetensors": """
        import shutil
        shutil.copytree("runs/mine/adapter", "lora")
        shutil.copytree("runs/mine/adapter", "dense-lora")
    """,
    "docs/tutorial.md: import flapkit": """
        import shutil
        shutil.rmtree("pruned")
    """,
    "docs/tutorial.md: class Mine": "from lightning import LightningModule",
    "docs/tutorial.md: from lightning": "calibration = torch.arange(256).view(8, 32)",
}
"""Page and first words of a snippet -> what the page takes for granted there."""

CARD_OF_RUN = f"runs/mine/{CARD}"
INSIDE = 'import os; os.chdir("runs")\n'

WITHOUT_FLAPKIT = ("docs/run-the-model.md: from transformers", f"{CARD_OF_RUN}: from transformers")
"""Snippets that run where flapkit is not installed."""

ELSEWHERE = (
    "README.md: # my_metric",
    "docs/architectures.md: from flapkit",
    "docs/how-to/layers.md",
    "docs/how-to/statistic.md",
    "docs/interfaces/",
)
"""Snippets that are plugins, which other tests load."""

NOT_CODE = ("docs/architecture.md: def prune_",)
"""What is an outline with parts left out."""

RUN = """
import json, sys, torch
for name in json.loads(sys.argv[2]):
    sys.modules[name] = None  # as if it were not installed
for place, code in json.load(open(sys.argv[1])).items():
    print("running", place, flush=True)
    scope = {"torch": torch, "__name__": "snippet"}
    if not "flapkit" in json.loads(sys.argv[2]):
        import flapkit
        scope["flapkit"] = flapkit
    exec(compile(code, place, "exec"), scope)
"""


def snippets(*pages: Path, root: Path) -> dict[str, str]:
    """Find the Python snippets of pages: the page and the snippet's first line -> its code."""
    found = {}
    for page in pages:
        for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            found[f"{page.relative_to(root)}: {code.strip().splitlines()[0]}"] = code
    return found


def run_on_terminal(code: dict[str, str], folder: Path, without: list[str]) -> tuple[int, str]:
    """Run snippets one after the other on a pseudo-terminal; return the exit code and what it showed."""
    (folder / "code.json").write_text(json.dumps(code))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, folder / "code.json", json.dumps(without)],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:
        pass  # Linux's way to say that the other end is closed.
    os.close(ours)
    return process.wait(), shown.decode(errors="replace")


@pytest.fixture
def runs(command, home) -> Path:
    """A folder with `runs/mine`, as pages name it: a pruned model with an adapter beside it."""
    trained = {"name": "lora", "rank": 2, "steps": 2, "length": 32, "merge": False, "dataset": "stdlib"}
    write_recipe(home, compensator=["bias", trained], output="runs/mine")
    code, _, shown = command("run", "recipe.yaml", "--no-cache")
    assert code == 0, shown
    return home


def test_snippets_run_and_ask_nothing(runs):
    pages = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    found = snippets(*pages, root=ROOT) | snippets(runs / CARD_OF_RUN, root=runs)
    named = (*BEFORE, *WITHOUT_FLAPKIT)
    ours = {place: code for place, code in found.items() if not place.startswith((*ELSEWHERE, *NOT_CODE))}
    assert all(place.startswith(named) for place in ours), "name a new snippet in this file"
    assert all(any(place.startswith(name) for place in ours) for name in named), "a snippet named here is gone"
    (glm,) = re.findall(r"```yaml\n(# glm\.yaml.*?)```", (ROOT / "docs/architectures.md").read_text(), flags=re.DOTALL)
    (runs / "glm.yaml").write_text(glm)

    plain = {place: code for place, code in ours.items() if place.startswith(WITHOUT_FLAPKIT)}
    # The process starts in the folder, where only the installed packages are found; flapkit is hidden from it.
    # A card names its model by the folder's name.
    plain = {place: INSIDE * place.startswith(CARD_OF_RUN) + code for place, code in plain.items()}
    assert_quiet(*run_on_terminal(plain, runs, ["flapkit"]))
    prepared = {}
    for name, before in BEFORE.items():
        (place,) = (place for place in ours if place.startswith(name))
        prepared[place] = re.sub(r"^ +", "", before, flags=re.MULTILINE) + "\n" + ours[place]
    assert_quiet(*run_on_terminal(prepared, runs, []))


def assert_quiet(code: int, shown: str) -> None:
    assert "y/N" not in shown, shown
    assert code == 0, shown
