"""What tests share: one thread, and tiny LLaMAs of every form."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

# Before anything imports huggingface_hub: no test waits for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import flapkit
from flapkit import cli
from flapkit.execution.lightning.module import CausalLM
from flapkit.run.report.document import RunDocument
from flapkit.run.report.figures import draw_structure

torch.set_num_threads(1)

# The same cases on every machine and in every run, and nothing kept of them; `deep` is for a search of an hour or two.
hypothesis.settings.register_profile("usual", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("deep", database=None, deadline=None, max_examples=12_500, print_blob=True)
hypothesis.settings.load_profile("usual")

FORMS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 12},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


CACHES = itertools.count()
TEXT = "def pruned(model):\n    return model\n" * 200
RECIPE = {
    "model": {"path": "builtin:tiny-llama", "dtype": "float32", "save_dtype": "float32"},
    "calibration": {"dataset": "text.txt", "samples": 8, "length": 32},
    "budget": {"ratio": 0.2},
    "evaluate": {"perplexity": [{"dataset": "text.txt", "length": 32, "windows": 4}]},
    "trainer": {"accelerator": "cpu"},
    "output": "out",
}


def recipe_text(**changes) -> str:
    """Write down the recipe of a small run on that text, with other sections where they are given."""
    return yaml.safe_dump({**RECIPE, **changes})


def write_recipe(folder: Path, name: str = "recipe.yaml", **changes) -> Path:
    """Write such a recipe into a folder; return its file."""
    path = folder / name
    path.write_text(recipe_text(**changes))
    return path


def make_llama(**options) -> LlamaForCausalLM:
    """Build a random LLaMA of two layers, with biases that are not zero."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
    }
    # No end token: a random model that meets one would stop generating early.
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, "eos_token_id": None, "initializer_range": 0.2, **options}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.eval()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Have the system refuse to write files of more bytes, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def without(monkeypatch) -> Callable[..., None]:
    """Have Python find some packages no more, as if they were not installed."""

    def remove(*packages: str) -> None:
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return remove


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """Keep statistics in a folder of the test's own, and out of the user's cache."""
    # Not by `mktemp`, which lists the folders of all tests before.
    folder = tmp_path_factory.getbasetemp() / f"cache-{next(CACHES)}"
    folder.mkdir()
    monkeypatch.setenv("FLAPKIT_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session", autouse=True)
def _once() -> Iterator[None]:
    """Do once in a process what is the same each time: find installed plugins, and draw the picture beside a report.

    Other tests draw pictures. The speed of products, which takes a tenth of a second, is that of a single one.
    """
    found, drawn = functools.cache(entry_points), list[bytes]()

    def draw(run: RunDocument) -> bytes:
        drawn.extend([] if drawn else [draw_structure(run)])
        return drawn[0]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("flapkit.registry.entry_points", found)
        patched.setattr("lightning.fabric.utilities.registry.entry_points", found)
        patched.setattr("flapkit.run.run_record.draw_structure", draw)
        patched.setattr("flapkit.run.pace.SECONDS", 1e-9)
        yield


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Let pytest hear flapkit's messages again after a command that was told to be quiet."""
    yield
    logging.getLogger("flapkit").propagate = True


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the real model, which `make smollm2` brings; for tests marked `real`."""
    folder = Path(__file__).parents[1] / "models" / "smollm2-135m"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"{folder} is absent: run `make smollm2`")
    return folder


@pytest.fixture
def forwards(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The batches that calibration has run, as they come."""
    seen, step = [], CausalLM.predict_step
    monkeypatch.setattr(CausalLM, "predict_step", lambda self, batch: seen.append(batch) or step(self, batch))
    return seen


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The folder where commands are run, which holds a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def recipe(home) -> Path:
    """The recipe of a small run, in that folder."""
    return write_recipe(home)


@pytest.fixture
def command(home, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a command in that folder; return its exit code and what it printed."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flapkit", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(params=FORMS)
def llama(request) -> LlamaForCausalLM:
    return make_llama(**FORMS[request.param])


@pytest.fixture
def tokens() -> torch.Tensor:
    """Calibration tokens [24, 16]."""
    return torch.randint(0, 96, (24, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def probe() -> torch.Tensor:
    """Tokens [2, 12] to compare logits on."""
    return torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def pruned_folder(tokens, tmp_path) -> Path:
    """A pruned LLaMA whose layers differ, saved."""
    model = make_llama(num_key_value_heads=2)
    flapkit.save(model, tmp_path / "pruned", flapkit.prune_(model, tokens, ratio=0.4))
    return tmp_path / "pruned"
