"""``flapkit show``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flapkit.cli.app import app
from flapkit.cli.output import print_
from flapkit.errors import ModelError


@app.command()
def show(checkpoint: Annotated[Path, typer.Argument(help="A folder that flapkit wrote.")]) -> None:
    """Show what a pruned checkpoint keeps, and what made it."""
    from flapkit.checkpoint import load_config
    from flapkit.checkpoint.folder import MARK

    config = load_config(checkpoint)
    if not (checkpoint / MARK).is_file():
        raise ModelError(f"{checkpoint}: holds no {MARK}: flapkit did not write it")
    try:
        made: dict[str, Any] = json.loads((checkpoint / MARK).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{checkpoint}: {MARK} is damaged: {error}") from error
    dense = {key: value for key, value in config.to_dict().items() if key != "per_layer_config"}
    table = Table("layer", "heads", "KV heads", "MLP width", title=str(checkpoint))
    for index, layer in enumerate(config.per_layer_config):
        sizes = [
            f"{getattr(layer, name)} of {dense[name]}"
            for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ]
        table.add_row(str(index), *sizes)
    print_(table)
    for key, value in made.items():
        said = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) if isinstance(value, dict) else value
        print_(f"{key}: {said}")
