"""``flapkit export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flapkit.cli.app import app
from flapkit.cli.output import print_, set_logging
from flapkit.system.errors import RecipeError


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A pruned checkpoint written by flapkit.")],
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="An exporter's name, from `flapkit list exporters`.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file or folder to write.")],
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="OPTION=VALUE", help="Set an option of the exporter.")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not run the export to compare logits.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a pruned checkpoint in another format, run it, and compare its logits with the pruned model's."""
    from flapkit.checkpoint.export import export as export_checkpoint
    from flapkit.registry import EXPORTER, Registry

    set_logging(quiet=False, verbose=False)
    registry = Registry.load()
    settings = dict(_option(text) for text in options or [])
    exporter = registry.create(EXPORTER, to, {**settings, **({"verify": False} if no_verify else {})})
    comparison = export_checkpoint(checkpoint, exporter, output, overwrite=overwrite)
    print_(f"{output}: {exporter.name} of {checkpoint}")
    print_(str(comparison) if comparison else "not verified")


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise RecipeError(f"--set {text}: expected option=value, such as dtype=bfloat16")
    from flapkit.recipe.nodes import parse
    from flapkit.recipe.overrides import override_position

    root, problems = parse(value, lambda line, column: override_position(text))
    if problems:
        raise RecipeError(*(str(problem) for problem in problems))
    return name, root.plain() if root else None
