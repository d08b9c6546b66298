"""The command line: one module for each command."""

from __future__ import annotations

from flapkit.cli import (
    bench,
    cache,
    check,
    check_adapter,
    evaluate,
    export,
    listing,
    push,
    recover,
    report,
    run,
    schema,
    show,
    sweep,
)
from flapkit.cli.app import app, main

__all__ = [
    "app",
    "bench",
    "cache",
    "check",
    "check_adapter",
    "evaluate",
    "export",
    "listing",
    "main",
    "push",
    "recover",
    "report",
    "run",
    "schema",
    "show",
    "sweep",
]
