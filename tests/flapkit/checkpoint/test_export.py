"""Exports: what is written is run, and what differs, or cannot be, is refused before anything is left of it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import make_llama

import flapkit
from flapkit.checkpoint.export import agreement, check_exports, export, is_uniform, prospect_of
from flapkit.checkpoint.formats import Exporter
from flapkit.registry import EXPORTER, Registry
from flapkit.system.errors import FlapkitError, InputError, OutputError, RunError


@dataclass(frozen=True)
class Echo(Exporter):
    """Writes where the model lies, and runs that with an error of one's choice."""

    name = "echo"
    suffix = ".txt"
    extra = "echo"

    error: float = 0.0
    needs: str = ""

    @property
    def packages(self):
        return [self.needs] if self.needs else []

    def write(self, checkpoint, path):
        path.write_text(str(checkpoint.folder))

    @contextmanager
    def open(self, path):
        model = flapkit.load(Path(path.read_text()))
        yield lambda tokens: model(tokens[None]).logits[0] * (1 + self.error)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_says_what_agrees(pruned_folder, tmp_path):
    found = export(pruned_folder, Echo(), tmp_path / "out.txt")
    assert found.difference == 0
    assert found.greedy == found.continued
    assert "agree with the pruned model's exactly" in str(found)
    assert left(tmp_path) == ["out.txt", "pruned"]


def test_what_differs_is_refused(pruned_folder, tmp_path):
    with pytest.raises(RunError, match="differs from the pruned model"):
        export(pruned_folder, Echo(error=1e-3), tmp_path / "out.txt")
    assert left(tmp_path) == ["pruned"]
    assert export(pruned_folder, Echo(error=1e-3, verify=False), tmp_path / "out.txt") is None


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(pruned_folder, tmp_path, error):
    with pytest.raises(RunError, match="differs"):
        export(pruned_folder, Echo(error=error), tmp_path / "out.txt")


def test_an_output_that_exists(pruned_folder, tmp_path):
    (tmp_path / "out.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        export(pruned_folder, Echo(), tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == "mine"
    export(pruned_folder, Echo(), tmp_path / "out.txt", overwrite=True)
    with pytest.raises(OutputError, match="is not a file"):
        export(pruned_folder, Echo(), pruned_folder, overwrite=True)


def test_a_missing_package_names_the_extra(pruned_folder, tmp_path):
    with pytest.raises(InputError, match=r'needs no_such_package.*pip install "flapkit\[echo\]"'):
        export(pruned_folder, Echo(needs="no_such_package"), tmp_path / "out.txt")


def test_two_exports_of_one_name():
    model = make_llama()
    prospect = prospect_of(model.config, flapkit.sites(model))
    check_exports([Echo()], prospect)
    with pytest.raises(InputError, match="echo is listed twice"):
        check_exports([Echo(), Echo(error=1)], prospect)


def test_a_missing_shard(pruned_folder, tmp_path):
    (pruned_folder / "model.safetensors").unlink()
    with pytest.raises(FlapkitError, match="has no weights"):
        export(pruned_folder, Registry.load().create(EXPORTER, "hf"), tmp_path / "out")
    assert left(tmp_path) == ["pruned"]


def test_the_prospect_tells_biases_and_whether_layers_are_alike(tokens):
    model = make_llama(num_key_value_heads=2)
    dense = prospect_of(model.config, flapkit.sites(model))
    assert (dense.family, dense.uniform, dense.biases) == ("llama", True, frozenset())
    flapkit.prune_(model, tokens, ratio=0.4)
    pruned = prospect_of(model.config, flapkit.sites(model))
    assert pruned.family == "llama"
    assert pruned.uniform == is_uniform(flapkit.sites(model))
    assert "mlp" in pruned.biases


def test_agreement_finds_where_texts_part():
    table = torch.eye(8)

    def follow(step):
        return lambda tokens: table[(tokens + step) % 8]

    assert agreement(follow(1), follow(1), 8).greedy == 24
    parted = agreement(follow(1), lambda tokens: follow(2 if len(tokens) > 12 else 1)(tokens), 8)
    assert (parted.greedy, parted.same_top) == (5, 0.0)
