"""``flapkit show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flapkit.cli.app import app
from flapkit.cli.output import print_
from flapkit.system.errors import ModelError


@app.command()
def show(checkpoint: Annotated[Path, typer.Argument(help="A checkpoint written by flapkit.")]) -> None:
    """Show the kept heads and widths of a pruned checkpoint, and how it was made."""
    from flapkit.checkpoint.folder import LAYERS, MARK
    from flapkit.checkpoint.modeling_file import check_modeling_file
    from flapkit.system.json_files import read_object

    if not checkpoint.is_dir():
        raise ModelError(f"model {checkpoint}: folder not found")
    if not (checkpoint / MARK).is_file():
        raise ModelError(f"{checkpoint}: has no {MARK}; flapkit did not write it")
    check_modeling_file(checkpoint, checkpoint)
    made = read_object(checkpoint / MARK, ModelError)
    layers = made.pop(LAYERS, None)
    if not isinstance(layers, dict) or not all(isinstance(sizes, dict) for sizes in layers.values()):
        raise ModelError(f"{checkpoint / MARK}: {LAYERS}: expected the heads and widths of each layer")
    names = list(dict.fromkeys(name for sizes in layers.values() for name in sizes))
    table = Table("layer", *names, title=str(checkpoint))
    for layer, sizes in layers.items():
        table.add_row(layer, *(_text(sizes.get(name, "")) for name in names))
    print_(table)
    for key, value in made.items():
        print_(f"{key}: {_text(value)}")


def _text(value: Any) -> str:
    """Write a value of ``flapkit.json`` as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items() if entry is not None)
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
