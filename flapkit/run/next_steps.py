"""What to do with a pruned model: the commands that are true for this one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flapkit.checkpoint.export import check_packages
from flapkit.checkpoint.serving import vllm_obstacle
from flapkit.recipe.load import LoadedRecipe
from flapkit.registry import EXPORTER
from flapkit.run.target import Target, prospect
from flapkit.system.errors import InputError

EXPORTS: tuple[tuple[str, dict[str, Any]], ...] = (("gguf", {}), ("hf-stock", {}), ("hf-stock", {"pad": True}))
"""Formats of other programs, with options; the first that is installed and holds the model is recommended."""


def next_steps(
    recipe: LoadedRecipe, target: Target, folder: str, dense: str, removed: Sequence[str] = ()
) -> dict[str, str]:
    """List what to do with the model that a recipe has pruned.

    Args:
        recipe: the recipe.
        target: what it pruned.
        folder: how to name the pruned model's folder.
        dense: how to name the dense model.
        removed: sites that lost all of their units.

    Returns:
        Purpose -> command.
    """
    # Double quotes, as in JSON: a shell's single quotes stand around it all.
    steps = {"load": f"python -c {shlex.quote(f'import flapkit; model = flapkit.load({json.dumps(folder)})')}"}
    output = shlex.quote(f"output={folder}-lora")
    folder, dense = shlex.quote(folder), shlex.quote(dense)
    if not vllm_obstacle(target.config, [site for site in target.sites if site.name not in removed]):
        steps["serve"] = f"vllm serve {folder} --trust-remote-code"
    steps["measure"] = f"flapkit bench {folder} --against {dense}"
    if export := _export(recipe, target, removed):
        steps["export"] = f"flapkit export {folder} --to {export}"
    steps["train"] = f"flapkit recover {folder} --set compensator=lora --set {output}"
    return steps


def _export(recipe: LoadedRecipe, target: Target, removed: Sequence[str]) -> str:
    """Write the options that export the model to the first format that holds it; empty if none does."""
    described = replace(prospect(recipe, target.config, target.sites), removed=tuple(removed), may_remove=False)
    for name, options in EXPORTS:
        exporter = recipe.registry.create(EXPORTER, name, options)
        try:
            check_packages(exporter)
            exporter.check(described)
        except InputError:
            continue
        output = f"model{exporter.suffix}" if exporter.suffix else name
        settings = "".join(f" --set {key}={str(value).lower()}" for key, value in options.items())
        return f"{name}{settings} -o {output}"
    return ""
