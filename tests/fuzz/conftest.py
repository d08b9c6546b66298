"""What every fuzz test has to keep to: little memory, and nothing asked."""

from __future__ import annotations

import builtins
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
