"""The model card of a pruned checkpoint: what it is, what made it, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from flapkit.system.errors import InputError
from flapkit.system.paths import to_path

CARD = "README.md"

LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

The layers differ in heads and widths, so the folder brings its own modeling file. With flapkit installed,
`flapkit.load("{name}")` needs no `trust_remote_code`."""


_FILES = """\
`plan.json` has the kept units of every layer as indices into the dense model: adapters that are trained on this model
can be mapped back with `flapkit.expand_lora`. `flapkit.json` has the versions and the options that made it."""


def model_card(
    name: str, base: str, *, metadata: Mapping[str, Any], result: Mapping[str, Any] | None, recipe: str | None
) -> str:
    """Write a model card.

    Args:
        name: what the checkpoint is called.
        base: the dense model: a hub id, a folder, or empty where nobody knows.
        metadata: what made the model, as in ``flapkit.json``.
        result: what was measured, as in ``result.json``, if anything was.
        recipe: the recipe, if one was run.

    Returns:
        Markdown with a header that the Hugging Face hub reads.
    """
    parts = [f"# {name}", f"{_sentence(base, metadata)}", "## Load", LOAD.format(name=name)]
    if result:
        parts += ["## Figures", *_figures(result)]
    if recipe:
        parts += ["## Recipe", f"```yaml\n{recipe.rstrip()}\n```"]
    parts += ["## Files", _FILES]
    return f"---\n{_header(base)}\n---\n\n" + "\n\n".join(parts) + "\n"


def licence_of(base: str) -> str | None:
    """Read the licence that the dense model's own card names, from its folder or from the hub's cache.

    Args:
        base: a hub id or a folder.

    Returns:
        Its identifier, such as ``apache-2.0``; None where no card is at hand, or it names none.
    """
    card: Any = _reached(f"{base}/{CARD}") if base else None
    try:
        if card is None or not card.is_file():
            card = try_to_load_from_cache(base, CARD) if is_hub_id(base) else None
    except HFValidationError:
        return None
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return None
    try:
        found = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):
        return None
    licence = found.get("license")
    return licence if isinstance(licence, str) else None


def is_hub_id(base: str) -> bool:
    """Tell whether a model's name is one on the hub, and no folder's."""
    path = _reached(base)
    return base.count("/") == 1 and not base.startswith((".", "~", "/")) and path is not None and not path.exists()


def _reached(name: str) -> Path | None:
    """Return a path by what somebody calls it; None where the system can have nothing there."""
    try:
        return to_path(name)
    except InputError:
        return None


def _header(base: str) -> str:
    data = ModelCardData(
        base_model=base if is_hub_id(base) else None,
        license=licence_of(base),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["flapkit", "pruning", "structured-pruning"],
    )
    return str(data.to_yaml())


def _sentence(base: str, metadata: Mapping[str, Any]) -> str:
    of = f" of {base if is_hub_id(base) else Path(base).name}" if base else ""
    how = [_named(metadata[kind]) for kind in ("metric", "searcher", "compensator") if metadata.get(kind)]
    by = f" by {', '.join(how)}" if how else ""
    licence = licence_of(base)
    under = " The dense model's licence holds for it; its card was not at hand when this was written." if base else ""
    if licence:
        under = f" The dense model's licence, {licence}, holds for it."
    return f"A structurally pruned version{of}, made with flapkit{by}.{under}"


def _named(component: Any) -> str:
    if isinstance(component, list):
        return " and ".join(_named(each) for each in component)
    return str(component["name"]) if isinstance(component, Mapping) else str(component)


MODELS = ("dense", "pruned", "recovered")
"""What a run measures, in the order of the card's columns."""


def _figures(result: Mapping[str, Any]) -> list[str]:
    counted: Mapping[str, int] = result.get("params", {})
    texts: Mapping[str, Mapping[str, Any]] = result.get("perplexity", {})
    models = [name for name in MODELS if name in counted or any(name in measured for measured in texts.values())]
    rows = [f"| | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    rows.append(_row("parameters", [f"{counted[name]:,}" if name in counted else "" for name in models]))
    for text, measured in texts.items():
        figures = ["" if measured.get(name) is None else f"{measured[name]:.3f}" for name in models]
        rows.append(_row(f"perplexity, {text}", figures))
    return ["\n".join(rows)]


def _row(name: str, figures: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(figures)} |"
