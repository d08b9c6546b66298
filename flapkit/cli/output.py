"""Tables, messages and logging of the commands."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from wrapt import when_imported

from flapkit.system.errors import OutputError
from flapkit.system.processes import is_rank_zero
from flapkit.system.progress import duration
from flapkit.system.workdir import write_file

STAGES = ("dense", "pruned", "recovered")
"""The models that a run measures, in its order."""


def print_(what: Any) -> None:
    """Print a table or a line; plain, unwrapped lines if stdout is not a terminal."""
    # Square brackets belong to names and formulas, not to rich's markup.
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, markup=False, width=200)
        if isinstance(what, Table):
            what.box = None
            what.title_justify = "left"
    console.print(what)


def add_perplexity(table: Table, texts: Mapping[str, Any]) -> None:
    """Add a row for each text: the perplexity of the dense and the pruned model, and the change."""
    for name, measured in texts.items():
        change = measured["pruned"] / measured["dense"] - 1
        table.add_row(f"perplexity, {name}", f"{measured['dense']:.3f}", f"{measured['pruned']:.3f}", f"{change:+.1%}")


def add_zero_shot(table: Table, tasks: Mapping[str, Any], stages: Sequence[str] = ("dense", "pruned")) -> None:
    """Add a row for each zero-shot metric: in per cent with standard errors, the change in points with McNemar's p.

    Args:
        table: has a column for each stage, and one for the change.
        tasks: task -> its metrics, as in ``result.json``.
        stages: the measured models; the change is from the first to the last, p compares the dense and the pruned
            model.
    """
    for task, result in tasks.items():
        for metric, scores in result["metrics"].items():
            first, last = scores.get(stages[0]), scores[stages[-1]]
            change = f"{100 * (last['value'] - first['value']):+.1f}" if first else ""
            paired = scores.get("paired") if stages[-1] == "pruned" else None
            change += f", p {paired['p_value']:.2g}" if paired else ""
            shown = [percent(scores[stage]) if stage in scores else "" for stage in stages]
            table.add_row(f"{task}, {metric}, %", *shown, change)


def percent(score: Mapping[str, float | None]) -> str:
    """Write a score and its standard error in per cent."""
    value, stderr = score["value"], score["stderr"]
    return f"{100 * (value or 0.0):.1f}" + ("" if stderr is None else f" ± {100 * stderr:.1f}")


def check_new(path: Path) -> None:
    """Raise ``OutputError`` unless a new file can be written; called before the work, so that no result is lost."""
    if path.exists() or path.is_symlink():
        raise OutputError(f"output {path}: exists already; choose another file, or remove it")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"output {path}: {path.parent} is not a writable folder")


def write_new(path: Path, text: str) -> None:
    """Write a new file atomically.

    Raises:
        OutputError: it exists already, or cannot be written.
    """
    check_new(path)
    write_file(path, text)


def set_logging(*, quiet: bool, verbose: bool) -> None:
    """Show flapkit's messages, none, or those of all libraries and the tracebacks of errors."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
    ours = logging.getLogger("flapkit")
    ours.setLevel(logging.DEBUG if verbose else logging.INFO)
    # Not by the level: a run records its warnings in the output even if they are not shown.
    ours.propagate = not quiet and is_rank_zero()
    ours.addHandler(logging.NullHandler())
    if verbose:
        return
    # It logs what it raises, and flapkit reports it.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    # It retries, and its final error reports the attempts.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    when_imported("transformers.utils.logging")(_quiet_transformers)
    # Lightning sets the level of its root logger on import; these are below it.
    for name in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.distributed"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def _quiet_transformers(logging: Any) -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()


class Result(Protocol):
    """The fields that the results of a run and of a recovery share."""

    @property
    def output(self) -> Path:
        """The output folder."""

    @property
    def params(self) -> Mapping[str, int]:
        """Parameters: ``dense``, ``pruned``, ``blocks``, ``removed``."""

    @property
    def costs(self) -> Sequence[Mapping[str, Any]]:
        """What the models cost in every measure, and what was asked for."""

    @property
    def perplexity(self) -> Mapping[str, Mapping[str, Any]]:
        """Name of the text -> stage -> perplexity."""

    @property
    def zero_shot(self) -> Mapping[str, Any]:
        """Task -> its items and scores."""

    @property
    def exports(self) -> Mapping[str, str]:
        """Name of an export -> the result of its verification."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """Stage -> wall time."""

    @property
    def total_seconds(self) -> float:
        """Wall time of the command."""


def print_result(model: str, result: Result) -> None:
    """Print sizes and perplexities of the dense, the pruned and, if there is one, the recovered model."""
    measured = [*result.perplexity.values()]
    measured += [scores for task in result.zero_shot.values() for scores in task["metrics"].values()]
    stages = [stage for stage in STAGES if any(stage in figures for figures in measured)] or ["dense", "pruned"]
    table = Table("", *stages, "change", title=f"{model} → {result.output}")
    if result.params:
        dense, pruned = result.params["dense"], result.params["pruned"]
        blocks, removed = result.params["blocks"], result.params["removed"]
        _add(table, stages, "parameters", {"dense": dense, "pruned": pruned, "recovered": pruned}, ",")
        after = blocks - removed
        _add(table, stages, "block parameters", {"dense": blocks, "pruned": after, "recovered": after}, ",")
    for row in result.costs:
        _add_cost(table, stages, row)
    for name, figures in result.perplexity.items():
        _add(table, stages, f"perplexity, {name}", figures, ".3f")
    add_zero_shot(table, result.zero_shot, stages)
    print_(table)
    for name, verification in result.exports.items():
        print_(f"exports/{name}: {verification}")
    print_("seconds: " + ", ".join(f"{stage} {time:.1f}" for stage, time in result.seconds.items()))
    print_(f"time: {duration(result.total_seconds)}")


def _add_cost(table: Table, stages: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add a row for what the models cost in one measure, unless it is there already and nothing was asked of it."""
    from flapkit.run.ledger import label_of, show

    if row["measure"] == "params" and row["asked"] is None:
        return
    values = {"dense": row["dense"], "pruned": row["pruned"], "recovered": row["pruned"]}
    name = label_of(row["measure"], row["detail"])
    name += f", at most {show(row['measure'], row['asked'])}" if row["asked"] is not None else ""
    shown = [show(row["measure"], values[stage]) for stage in stages]
    table.add_row(name, *shown, f"{values[stages[-1]] / values[stages[0]] - 1:+.1%}")


def _add(table: Table, stages: Sequence[str], name: str, values: Mapping[str, Any], form: str) -> None:
    shown = [values[stage] for stage in stages]
    table.add_row(name, *(format(value, form) for value in shown), f"{shown[-1] / shown[0] - 1:+.1%}")
