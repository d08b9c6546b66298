"""What every fuzz test has to keep to: little memory, and nothing asked; and the checkpoints that are changed."""

from __future__ import annotations

import builtins
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_llama
from fuzzing import cut_

import flapkit

GIGABYTES = 4


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    """Whoever believes a header or a configuration and allocates what it says fails."""
    if sys.platform != "linux":
        yield
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="module", autouse=True)
def nobody_asks() -> Iterator[None]:
    """A question at the terminal, such as whether to trust a checkpoint's code, is a failure."""

    def asked(*args: Any) -> str:
        raise AssertionError("somebody was asked something")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(builtins, "input", asked)
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A checkpoint of one layer."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    make_llama(num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """A checkpoint of one pruned layer."""
    folder = tmp_path_factory.mktemp("pruned") / "model"
    model = make_llama(num_hidden_layers=1, num_key_value_heads=2)
    flapkit.save(model, folder, cut_(model, units=1))
    return folder
