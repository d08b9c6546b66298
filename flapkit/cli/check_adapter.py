"""``flapkit check-adapter``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flapkit.cli.app import app
from flapkit.cli.output import print_, set_logging
from flapkit.system.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@app.command("check-adapter")
def check_adapter(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model type, a folder, or a hub id.")],
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="An adapter's name, from `flapkit list adapters`.")
    ] = None,
    plugins: Annotated[
        list[Path] | None, typer.Option("--plugin", metavar="FILE", help="A Python or YAML file of your own.")
    ] = None,
) -> None:
    """Check an adapter on tiny random models; no weights are read."""
    from flapkit.recipe.plugin_files import load_registry
    from flapkit.registry import ADAPTER
    from flapkit.testing import conformance

    set_logging(quiet=True, verbose=False)
    warnings.filterwarnings("ignore", module="transformers|peft|torch")
    registry = load_registry(plugins or [])
    config = _config(model)
    chosen = registry.create(ADAPTER, adapter) if adapter else registry.adapter_for(config)
    table = Table("form", "check", "", title=f"{config.model_type}: adapter {chosen.name}")
    failed, refused = 0, []
    for outcome in conformance(chosen, config):
        failed += not outcome.passed
        refused += [outcome.form] * outcome.refused
        mark = "FAILED: " if not outcome.passed else "refused: " if outcome.refused else ""
        table.add_row(outcome.form, outcome.check, mark + outcome.figure)
    print_(table)
    checked = table.row_count - len(refused)
    if failed:
        raise RunError(f"adapter {chosen.name!r}: {failed} of {checked} checks failed")
    print_(f"all {checked} checks passed")
    if refused:
        print_(f"refused, so that they are never pruned: models of the forms {', '.join(refused)}")


def _config(model: str) -> PreTrainedConfig:
    """Read a configuration, or make a tiny one of a model type."""
    from transformers import CONFIG_MAPPING

    from flapkit.checkpoint.load import load_config
    from flapkit.model.tiny import tiny_config

    if model in CONFIG_MAPPING and not Path(model).is_dir():
        return tiny_config(model)
    return load_config(model)
