"""How commands print, and which messages are shown."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flapkit.errors import OutputError


def print_(what: Any) -> None:
    """Print a table or a line; where nobody looks at a terminal, plain lines that are not broken."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=200)
        if isinstance(what, Table):
            what.box = None
            what.title_justify = "left"
    console.print(what, markup=False) if isinstance(what, str) else console.print(what)


def add_perplexity(table: Table, texts: Mapping[str, Any]) -> None:
    """Add a row for each text: the perplexity of the dense and of the pruned model, and the change."""
    for name, measured in texts.items():
        change = measured["pruned"] / measured["dense"] - 1
        table.add_row(f"perplexity, {name}", f"{measured['dense']:.3f}", f"{measured['pruned']:.3f}", f"{change:+.1%}")


def add_zero_shot(table: Table, tasks: Mapping[str, Any]) -> None:
    """Add a row for each zero-shot metric: in percent with standard errors, the change in points with McNemar's p."""
    for task, found in tasks.items():
        for metric, scores in found["metrics"].items():
            dense, pruned, paired = scores["dense"], scores["pruned"], scores.get("paired")
            change = f"{100 * (pruned['value'] - dense['value']):+.1f}"
            change += f", p {paired['p_value']:.2g}" if paired else ""
            table.add_row(f"{task}, {metric}, %", percent(dense), percent(pruned), change)


def percent(score: Mapping[str, float | None]) -> str:
    """Write a score and its standard error in percent."""
    value, stderr = score["value"], score["stderr"]
    return f"{100 * (value or 0.0):.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")


def check_new(path: Path) -> None:
    """Raise ``OutputError`` unless a file of this name can be made: checked before the work, so that none is lost."""
    if path.exists() or path.is_symlink():
        raise OutputError(f"output {path}: exists already; choose another file, or remove it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {path}: {path.parent} is no folder that can be written")


def write_new(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: it exists already, or cannot be written.
    """
    check_new(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"output {path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def set_logging(*, quiet: bool, verbose: bool) -> None:
    """Show flapkit's own messages, or none, or every library's."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("flapkit").setLevel(logging.ERROR if quiet else logging.INFO)
    if verbose:
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # Lightning sets the level of its own root when it is imported; these are below it.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
