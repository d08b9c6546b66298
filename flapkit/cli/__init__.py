"""The command line: one module for each command, named after it.

A command imports torch, transformers and the rest of flapkit inside its function, so that `flapkit --help` is quick.

Modules besides the commands:
    app: the application, its exit codes and signals
    listing: `flapkit list`
    options: arguments and options that several commands share
    output: tables, messages and logging
    progress: bars, plain lines or JSON events
"""

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
