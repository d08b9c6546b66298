"""Every Python snippet of a page and of a model card runs as it stands, and asks for nothing.

Those that need no flapkit run on a pseudo-terminal, where transformers asks whether to run a model's code if a snippet
does not say so.
"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import pytest
import torch
from blocks import NOTEBOOK, OUTLINES, PLUGINS, ROOT, blocks
from conftest import write_recipe

import flapkit
from flapkit.checkpoint.card import CARD
from flapkit.text import places
from flapkit.text.stdlib import stdlib_documents

BEFORE = {
    "README.md: import flapkit": """
        import torch
        from flapkit.checkpoint.load import load_tokenizer
        model, tokenizer = flapkit.load("builtin:tiny-llama"), load_tokenizer("builtin:tiny-llama")
        calibration = torch.arange(256).view(8, 32)
    """,
    "docs/architectures.md: from pathlib import Path": "",
    "docs/cluster.md: model = flapkit": "",
    "docs/how-to/draft.md: # draft.py": "",
    "docs/how-to/fine-tune.md: import flapkit": "",
    "docs/how-to/lightning.md: import flapkit": "",
    "docs/how-to/lightning.md: from flapkit": """
        import flapkit, torch
        from flapkit.checkpoint.load import load_tokenizer
        from lightning.pytorch import Trainer
        tokens, tokenizer = torch.arange(256).view(8, 32), load_tokenizer("builtin:tiny-llama")
    """,
    "docs/how-to/plot.md: import json": "",
    "docs/how-to/plot.md: import pandas": """
        import os
        os.makedirs("runs/sweeps/compare")
        columns = "method,metric,budget.ratio,perplexity.stdlib_heldout.128,error"
        lines = [columns, "dense,,,14.8,", ",wifv,0.2,21.1,", ",wifv,0.5,60.2,", ",random,0.2,40.1,", ",random,0.5,,no"]
        open("runs/sweeps/compare/table.csv", "w").write("\\n".join(lines))
    """,
    "docs/how-to/remove-experts.md: flapkit.prune_": """
        from flapkit.model.tiny import tiny_config, tiny_model
        model, tokens = tiny_model(tiny_config("qwen3_moe")), torch.arange(96).view(8, 12)
    """,
    "docs/how-to/statistic.md: import torch": "",
    "docs/how-to/statistic.md: import flapkit": "",
    "docs/how-to/vision-language.md: from transformers": """
        from flapkit.checkpoint.load import load_tokenizer
        from flapkit.model.tiny import tiny_config, tiny_model
        tiny_model(tiny_config("llava")).save_pretrained("my-llava")
        processor, tokens = load_tokenizer("builtin:tiny-llama"), torch.arange(90).view(9, 10)
    """,
    "docs/layerwise.md: from flapkit": """
        path, batches = "builtin:tiny-llama", [{"input_ids": torch.arange(64).view(2, 32)}]
    """,
    "docs/lora.md: import flapkit": "",
    "docs/reference/lightning.md: import flapkit": "tokens = torch.arange(768).view(24, 32)",
    "docs/reference/text.md: from flapkit": 'open("notes.txt", "w").write("A line of a text. " * 200)',
    "docs/run-the-model.md: from peft": "",
    "docs/run-the-model.md: from safetensors": """
        import shutil
        shutil.copytree("runs/mine/adapter", "lora")
        shutil.copytree("runs/mine/adapter", "dense-lora")
    """,
}
"""Page and first words of a snippet -> what the page takes for granted there."""

CARD_OF_RUN = f"runs/mine/{CARD}"
INSIDE = 'import os; os.chdir("runs")\n'

WITHOUT_FLAPKIT = ("docs/run-the-model.md: from transformers", f"{CARD_OF_RUN}: from transformers")
"""Snippets that run where flapkit is not installed."""

RUN = """
import json, sys
sys.modules["flapkit"] = None  # as if it were not installed
for place, code in json.load(open(sys.argv[1])).items():
    print("running", place, flush=True)
    exec(compile(code, place, "exec"), {"__name__": "snippet"})
"""


def snippets(card: Path) -> dict[str, str]:
    """Find the Python snippets of the pages and of a run's card: the page and the snippet's first line -> its code."""
    found = {block.place: block.code for block in blocks() if block.language == "python"}
    for code in re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), flags=re.DOTALL):
        found[f"{CARD_OF_RUN}: {code.strip().splitlines()[0]}"] = code
    return found


def run_on_terminal(code: dict[str, str], folder: Path) -> tuple[int, str]:
    """Run snippets without flapkit, in turn, on a pseudo-terminal; return the exit code and what it showed."""
    (folder / "code.json").write_text(json.dumps(code))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, folder / "code.json"],
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
    trained = {"name": "lora", "rank": 2, "steps": 2, "length": 32, "merge": False, "dataset": "training.txt"}
    (home / "training.txt").write_text("class Other:\n    size = 3\n" * 400)
    write_recipe(home, compensator=["bias", trained], output="runs/mine")
    code, _, shown = command("run", "recipe.yaml", "--no-cache")
    assert code == 0, shown
    return home


def test_snippets_run_and_ask_nothing(runs, monkeypatch):
    matplotlib.use("agg")
    monkeypatch.chdir(runs)
    found = snippets(runs / CARD_OF_RUN)
    named = (*BEFORE, *WITHOUT_FLAPKIT)
    ours = {place: code for place, code in found.items() if not place.startswith((*PLUGINS, *OUTLINES, NOTEBOOK))}
    assert all(place.startswith(named) for place in ours), "name a new snippet in this file"
    assert all(any(place.startswith(name) for place in ours) for name in named), "a snippet named here is gone"
    (glm,) = re.findall(r"```yaml\n(# glm\.yaml.*?)```", (ROOT / "docs/architectures.md").read_text(), flags=re.DOTALL)
    (runs / "glm.yaml").write_text(glm)
    (runs / "largest.py").write_text(next(code for place, code in found.items() if "statistic.md: # largest" in place))
    monkeypatch.syspath_prepend(runs)
    few = stdlib_documents("train")[:10]  # The tokens of all of them take minutes.
    monkeypatch.setattr(places, "stdlib_documents", lambda split: few)

    plain = {place: code for place, code in ours.items() if place.startswith(WITHOUT_FLAPKIT)}
    # The process starts in the folder, where only the installed packages are found; flapkit is hidden from it.
    # A card names its model by the folder's name.
    plain = {place: INSIDE * place.startswith(CARD_OF_RUN) + code for place, code in plain.items()}
    exit_code, shown = run_on_terminal(plain, runs)
    assert "y/N" not in shown, shown
    assert exit_code == 0, shown
    for name, before in BEFORE.items():
        (place,) = (place for place in ours if place.startswith(name))
        run_here(place, re.sub(r"^ +", "", before, flags=re.MULTILINE) + "\n" + ours[place])


def run_here(place: str, code: str) -> None:
    """Run a snippet in this process, which has imported everything; a question would be an error without a terminal."""
    print("running", place)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        exec(compile(code, place, "exec"), {"__name__": "snippet", "torch": torch, "flapkit": flapkit})
