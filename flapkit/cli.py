"""The command line: run, check, list, show and schema."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flapkit.errors import FlapkitError, InputError, ModelError

INTERRUPTED = 130
"""Exit code of Ctrl-C, as shells have it."""

app = typer.Typer(
    help="Structured pruning of large language models without retraining.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name of `list recipes`.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in budget.ratio=0.3.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that flapkit wrote.")]


class Kind(str, Enum):
    """What ``flapkit list`` can be asked for."""

    METRICS = "metrics"
    SEARCHERS = "searchers"
    COMPENSATORS = "compensators"
    ADAPTERS = "adapters"
    DATASETS = "datasets"
    RECIPES = "recipes"


def main() -> None:
    """Run the command line; exit code 0, 1 where a run failed, 2 where the input was wrong, 130 for Ctrl-C."""
    # transformers and Lightning draw their own bars and give advice on what flapkit decides.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(standalone_mode=False)
    except FlapkitError as error:
        _fail(str(error), error.exit_code)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except Exception as error:
        # typer brings along, or depends on, the click whose usage errors these are.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(InputError.exit_code)
    # Without its standalone mode typer returns the code of Ctrl-C and of --help.
    if code == INTERRUPTED:
        _fail("stopped; nothing was written", INTERRUPTED)


def _fail(message: str, code: int) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {message}", markup=False)
    sys.exit(code)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    overwrite: Overwrite = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print every library's messages.")] = False,
) -> None:
    """Prune a model as a recipe says."""
    from flapkit.recipe import find_recipe, load_recipe
    from flapkit.run import run as run_recipe

    loaded = load_recipe(find_recipe(recipe), overrides or [])
    _set_logging(quiet=quiet, verbose=verbose)
    result = run_recipe(loaded, overwrite=overwrite, progress=sys.stdout.isatty() and not quiet)
    if quiet:
        return
    dense, pruned = result.params["dense"], result.params["pruned"]
    table = Table("", "dense", "pruned", "change", title=f"{loaded.recipe.model.path} → {result.output}")
    table.add_row("parameters", f"{dense:,}", f"{pruned:,}", f"{pruned / dense - 1:+.1%}")
    blocks, removed = result.params["blocks"], result.params["removed"]
    table.add_row("block parameters", f"{blocks:,}", f"{blocks - removed:,}", f"{-removed / blocks:+.1%}")
    for name, measured in result.perplexity.items():
        change = measured["pruned"] / measured["dense"] - 1
        table.add_row(f"perplexity, {name}", f"{measured['dense']:.3f}", f"{measured['pruned']:.3f}", f"{change:+.1%}")
    _print(table)
    _print("seconds: " + ", ".join(f"{stage} {time:.1f}" for stage, time in result.seconds.items()))


@app.command()
def check(recipe: RecipeArgument, overrides: Overrides = None, overwrite: Overwrite = False) -> None:
    """Check a recipe, and say what it will do and need, without running it."""
    from flapkit.check import check as check_recipe
    from flapkit.recipe import find_recipe, load_recipe

    _set_logging(quiet=True, verbose=False)
    loaded = load_recipe(find_recipe(recipe), overrides or [])
    found = check_recipe(loaded, overwrite=overwrite)
    asked = loaded.recipe
    table = Table("", "", title=f"{loaded.path}: right", show_header=False)
    table.add_row("model", f"{asked.model.path} ({found.target.config.model_type}), {found.params:,} parameters")
    table.add_row("adapter", f"{found.target.adapter.name}: {len(found.target.sites)} sites")
    for kind in ("metric", "searcher", "compensator"):
        spec = getattr(asked, kind)
        options = ", ".join(f"{key}={value}" for key, value in spec.options.items())
        table.add_row(kind, f"{spec.name}({options})" if options else spec.name)
    text = asked.calibration
    table.add_row("calibration", f"{text.dataset}: {text.samples} windows of {text.length} tokens")
    table.add_row("budget", f"{found.budget.params:,} of {found.budget.base:,} parameters of {asked.budget.of}")
    table.add_row("weights", f"{found.weights / 1e9:,.3f} GB")
    table.add_row("memory, about", f"{found.memory / 1e9:,.3f} GB beside the program's own")
    table.add_row("output", asked.output)
    _print(table)


@app.command("list")
def list_(kind: Annotated[Kind | None, typer.Argument(help="One kind; all if not given.")] = None) -> None:
    """List the components, datasets and recipes that are installed."""
    for each in Kind if kind is None else [kind]:
        table = Table("name", "what it is", "from", title=each.value)
        for row in _rows(each):
            table.add_row(*row)
        _print(table)


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
    _print(table)
    for key, value in made.items():
        said = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None) if isinstance(value, dict) else value
        _print(f"{key}: {said}")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, with every installed plugin's options."""
    from flapkit.recipe import recipe_schema
    from flapkit.registry import Registry

    sys.stdout.write(json.dumps(recipe_schema(Registry.load()), indent=2) + "\n")


def _rows(kind: Kind) -> list[tuple[str, str, str]]:
    if kind is Kind.DATASETS:
        from flapkit.text import DATASETS

        return [(name, dataset.description, "flapkit") for name, dataset in DATASETS.items()]
    if kind is Kind.RECIPES:
        from flapkit.recipe import shipped_recipes

        return [
            (name, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# "), "flapkit")
            for name, path in shipped_recipes().items()
        ]
    from flapkit.registry import Registry

    registry, singular = Registry.load(), kind.value.removesuffix("s")
    return [
        (name, (component.__doc__ or "").split("\n")[0], registry.origin(singular, name))
        for name, component in registry.names(singular).items()
    ]


def _print(what: Any) -> None:
    """Print a table or a line; where nobody looks at a terminal, plain lines that are not broken."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=200)
        if isinstance(what, Table):
            what.box = None
            what.title_justify = "left"
    console.print(what, markup=False) if isinstance(what, str) else console.print(what)


def _set_logging(*, quiet: bool, verbose: bool) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("flapkit").setLevel(logging.ERROR if quiet else logging.INFO)
    if verbose:
        return
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # Lightning sets the level of its own root when it is imported; these are below it.
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
