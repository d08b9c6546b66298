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
    from flapkit.checkpoint.folder import LAYERS, MARK, PARAMETERS
    from flapkit.checkpoint.modeling_file import check_modeling_file
    from flapkit.system.json_files import read_object

    if not checkpoint.is_dir():
        raise ModelError(f"model {checkpoint}: folder not found")
    if not (checkpoint / MARK).is_file():
        raise ModelError(f"{checkpoint}: has no {MARK}; flapkit did not write it")
    check_modeling_file(checkpoint, checkpoint)
    made = read_object(checkpoint / MARK, ModelError)
    try:
        layers = {layer: _cells(sizes, PARAMETERS) for layer, sizes in made.pop(LAYERS).items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{checkpoint / MARK}: {LAYERS}: expected the heads and widths of each layer") from error
    names = list(dict.fromkeys(name for sizes in layers.values() for name in sizes))
    names.sort(key="removed".__eq__)
    caption = "removed: of the parameters of the layer's attention and MLP"
    table = Table("layer", *names, title=str(checkpoint), caption=caption)
    for layer, sizes in layers.items():
        table.add_row(layer, *(sizes.get(name, "") for name in names))
    print_(table)
    for key, value in made.items():
        print_(f"{key}: {_text(value)}")


def _cells(sizes: dict[str, dict[str, int]], parameters: str) -> dict[str, str]:
    """Write the sizes of a layer: column -> text."""
    cells = {name: f"{counts['kept']} of {counts['dense']}" for name, counts in sizes.items() if name != parameters}
    counts = sizes[parameters]
    return {**cells, "removed": f"{1 - counts['kept'] / counts['dense']:.1%}"}


def _text(value: Any) -> str:
    """Write a value of ``flapkit.json`` as text, without the options that are not set."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items() if entry not in (None, [], {}))
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
