"""``flapkit show``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from flapkit.cli.app import app
from flapkit.cli.output import print_
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from flapkit.model.declaration import Family


@app.command()
def show(checkpoint: Annotated[Path, typer.Argument(help="A checkpoint written by flapkit.")]) -> None:
    """Show the kept heads and widths of a pruned checkpoint, and how it was made."""
    from flapkit.checkpoint.folder import MARK
    from flapkit.checkpoint.load import load_config
    from flapkit.model.classes import dense_config
    from flapkit.model.declaration import declaration_of
    from flapkit.system.json_files import read_object

    config = load_config(checkpoint)
    if not (checkpoint / MARK).is_file():
        raise ModelError(f"{checkpoint}: has no {MARK}; flapkit did not write it")
    made = read_object(checkpoint / MARK, ModelError)
    family = declaration_of(config)
    (kept, left), (dense, whole) = _sizes(config, family), _sizes(dense_config(config), family)
    names = list(dict.fromkeys(name for _, name in dense))
    caption = "removed: of the parameters of the layer's attention and MLP"
    table = Table("layer", *names, "removed", title=str(checkpoint), caption=caption)
    for layer in sorted({layer for layer, _ in dense}):
        cells = [
            f"{kept.get((layer, name), 0)} of {dense[layer, name]}" if (layer, name) in dense else "" for name in names
        ]
        table.add_row(str(layer), *cells, f"{1 - left[layer] / whole[layer]:.1%}")
    print_(table)
    for key, value in made.items():
        print_(f"{key}: {_text(value)}")


def _text(value: Any) -> str:
    """Write a value of ``flapkit.json`` as text, without the options that are not set."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items() if entry not in (None, [], {}))
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _sizes(config: PreTrainedConfig, family: Family) -> tuple[dict[tuple[int, str], int], Counter[int]]:
    """Count the heads and channels of each layer, (layer, name) -> count; and the parameters of its pruned blocks."""
    from flapkit.model.empty import skeleton
    from flapkit.model.layout import sites_of

    sizes, params = {}, Counter[int]()
    model = skeleton(config)
    sites = sites_of(model, family)
    paths = {(site.layer, site.path) for site in sites}
    # The module of the experts is part of that of the mixture.
    for layer, of in {(layer, of) for layer, path in paths for of in model.get_submodule(path).parameters()}:
        params[layer] += of.numel()
    for site in sites:
        if site.kind == "attention":
            sizes[site.layer, "heads"] = site.heads
            sizes[site.layer, "KV heads"] = site.kv_heads
        elif site.kind == "mixture":
            sizes[site.layer, "experts"] = site.units
        else:
            sizes[site.layer, f"{site.block_name} width"] = site.channels
    return sizes, params
