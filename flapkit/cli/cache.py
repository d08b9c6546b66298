"""``flapkit cache``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from flapkit.cli.app import app
from flapkit.cli.output import print_
from flapkit.system.sizes import counted


@app.command()
def cache(clear: Annotated[bool, typer.Option("--clear", help="Remove all files.")] = False) -> None:
    """Show the cache of statistics and tokens: its folder, its files and their sizes."""
    from flapkit.execution.cache import clear as clear_cache
    from flapkit.execution.cache import entries
    from flapkit.system.paths import cache_folder

    folder = cache_folder()
    files = clear_cache(folder) if clear else entries(folder)
    size = f"{sum(entry.size for entry in files) / 1e6:,.1f} MB"
    if clear:
        print_(f"{folder}: {counted(len(files), 'file')} removed, {size}")
        return
    table = Table("content", "model", "MB", "file", title=f"{folder}: {counted(len(files), 'file')}, {size}")
    for entry in files:
        table.add_row(entry.statistic or "unreadable", entry.model, f"{entry.size / 1e6:,.1f}", entry.path.name)
    print_(table)
