"""``flapkit push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flapkit.cli.app import app
from flapkit.cli.output import print_, set_logging


@app.command()
def push(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint written by flapkit.")],
    repo: Annotated[str, typer.Argument(help="The repository, owner/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to write to; main if not given.")] = None,
    exports: Annotated[bool, typer.Option("--exports", help="Also upload the folder exports.")] = False,
) -> None:
    """Upload a pruned checkpoint to the Hugging Face hub."""
    from flapkit.checkpoint.push import push as push_folder

    set_logging(quiet=False, verbose=False)
    print_(push_folder(checkpoint, repo, private=private, revision=revision, exports=exports))
