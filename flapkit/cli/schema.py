"""``flapkit schema``."""

from __future__ import annotations

import json
import sys

from flapkit.cli.app import app


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, with the options of all installed components."""
    from flapkit.recipe.json_schema import recipe_schema
    from flapkit.registry import Registry

    sys.stdout.write(json.dumps(recipe_schema(Registry.load()), indent=2) + "\n")
