from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_llama

import flapkit
from flapkit.evaluation.speed import Workload
from flapkit.run.bench import bench
from flapkit.system.errors import InputError

SMALL = Workload(prompt=8, tokens=2, repetitions=1, warm_up=0)


@pytest.fixture
def pair(tmp_path: Path, tokens: torch.Tensor) -> tuple[str, str]:
    model = make_llama()
    model.save_pretrained(tmp_path / "dense")
    plan = flapkit.prune_(model, tokens, ratio=0.5)
    flapkit.save(model, tmp_path / "pruned", plan)
    return str(tmp_path / "pruned"), str(tmp_path / "dense")


def test_ratios_and_the_promise(pair: tuple[str, str]) -> None:
    found = bench(*pair, SMALL, device="cpu")
    pruned, dense = (found.speeds[path] for path in pair)
    assert found.ratios["params"] == pruned.params / dense.params
    assert found.ratios["decode"] == pruned.decode.median / dense.decode.median
    assert found.expected == dense.read_params / pruned.read_params
    assert found.expected > 1
    assert found.environment["threads"] == torch.get_num_threads()


def test_alone_it_has_no_ratios(pair: tuple[str, str]) -> None:
    found = bench(pair[0], None, SMALL, device="cpu")
    assert (found.ratios, found.expected) == ({}, None)


def test_what_cannot_be_compared(pair: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be compared with itself"):
        bench(pair[0], pair[0], SMALL)
    make_llama().half().save_pretrained(tmp_path / "half")
    with pytest.raises(InputError, match="float16 and float32; give --dtype"):
        bench(pair[0], str(tmp_path / "half"), SMALL, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(pair: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="torch finds no GPU"):
        bench(pair[0], None, SMALL, device="cuda")
