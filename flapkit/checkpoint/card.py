"""The model card of a pruned checkpoint: what it is, how it was made, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub.errors import HFValidationError

from flapkit.checkpoint.modeling_file import ENTRY
from flapkit.model.empty import CAUSAL_LM, IMAGE_TEXT
from flapkit.system.errors import InputError
from flapkit.system.paths import to_path

CARD = "README.md"

LOAD = """\
```python
from transformers import {head}, Auto{reader}

model = {head}.from_pretrained("{name}", trust_remote_code=True)
{variable} = Auto{reader}.from_pretrained("{name}", trust_remote_code=True)
```

The layers differ in heads and widths, so the folder contains a modeling file. {with_flapkit}"""

OTHERS = """\
The model has a model type of its own: other programs need an option to run the modeling file, and PEFT needs the
modules to train.

| | |
|---|---|
| pipelines | `pipeline("text-generation", "{name}", trust_remote_code=True)` |
| classifiers | `AutoModelForSequenceClassification.from_pretrained("{name}", trust_remote_code=True)` |
| PEFT | `LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")` |
| lm-eval | `lm_eval --model hf --model_args pretrained={name},trust_remote_code=True --tasks arc_easy` |"""
"""What other programs need to know about a language model."""

WITH_FLAPKIT = {
    True: 'With flapkit installed,\n`flapkit.load("{name}")` needs no `trust_remote_code`.',
    False: "Once flapkit is\nimported, this needs no `trust_remote_code`.",
}
"""Whether it is a language model -> how to load it with flapkit."""

PIPELINES = {
    CAUSAL_LM: "text-generation",
    IMAGE_TEXT: "image-text-to-text",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}
"""Auto class -> the hub's name of its task."""


_PLAN = """\
`plan.json` lists the kept units of every layer as indices into the dense model; `flapkit.expand_lora` uses it to map
adapters trained on this model back to the dense one. """

_MARK = "`flapkit.json` contains the package versions and the options."

_MODELING = """

`trust_remote_code=True` runs `{file}`. The file is unchanged if `sha256sum {file}` prints

```
{digest}  {file}
```"""


def model_card(
    name: str,
    base: str,
    *,
    metadata: Mapping[str, Any],
    result: Mapping[str, Any] | None,
    recipe: str | None,
    has_plan: bool = True,
    head: str = CAUSAL_LM,
) -> str:
    """Write a model card.

    Args:
        name: the checkpoint's name.
        base: the dense model: a hub id, a folder, or empty if unknown.
        metadata: how the model was made, as in ``flapkit.json``.
        result: the measurements, as in ``result.json``, if any.
        recipe: the recipe, if one was run.
        has_plan: the folder has a ``plan.json``.
        head: the Auto class that loads it.

    Returns:
        Markdown with the YAML header of the Hugging Face hub.
    """
    with_flapkit = WITH_FLAPKIT[head in (CAUSAL_LM, IMAGE_TEXT)].format(name=name)
    reader = "Processor" if head == IMAGE_TEXT else "Tokenizer"
    load = LOAD.format(name=name, head=head, with_flapkit=with_flapkit, reader=reader, variable=reader.lower())
    parts = [f"# {name}", f"{_sentence(base, metadata)}", "## Load", load]
    if head == CAUSAL_LM:
        parts.append(OTHERS.format(name=name))
    if result:
        parts += ["## Results", *_results(result)]
    if recipe:
        parts += ["## Recipe", f"```yaml\n{recipe.rstrip()}\n```"]
    code = [_MODELING.format(file=file, digest=digest) for file, digest in metadata.get(ENTRY, {}).items()]
    parts += ["## Files", "".join([_PLAN if has_plan else "", _MARK, *code])]
    return f"---\n{_header(base, head)}\n---\n\n" + "\n\n".join(parts) + "\n"


def published_card(card: str, repo: str, revision: str | None = None) -> str:
    """Let a model card name the repository that holds the model, in place of the folder that it was written to.

    Args:
        card: the folder's card.
        repo: the repository, ``owner/name``.
        revision: the branch, if it is not the repository's main one.
    """
    title, (before, heading, after) = re.search(r"^# (.+)$", card, flags=re.MULTILINE), card.partition("\n## Load\n")
    if title is None or not heading:
        return card
    name, load, rest = title[1], *_split_section(after)
    option = f', revision="{revision}"' if revision else ""
    load = re.sub(f'"{re.escape(name)}"(?=[,)])', lambda _: f'"{repo}"{option}', load)
    option = f",revision={revision}" if revision else ""
    load = re.sub(f"pretrained={re.escape(name)}(?=,)", lambda _: f"pretrained={repo}{option}", load)
    return before.replace(title[0], f"# {repo}", 1) + heading + load + rest


def _split_section(text: str) -> tuple[str, str]:
    """Split text at the next heading."""
    found = re.search(r"^## ", text, flags=re.MULTILINE)
    end = len(text) if found is None else found.start()
    return text[:end], text[end:]


def licence_of(base: str) -> str | None:
    """Read the licence from the dense model's own card, in its folder or in the hub's cache.

    Args:
        base: a hub id or a folder.

    Returns:
        The identifier, such as ``apache-2.0``; None if there is no card, or it names no licence.
    """
    card: Any = _path_or_none(f"{base}/{CARD}") if base else None
    try:
        if card is None or not card.is_file():
            card = huggingface_hub.try_to_load_from_cache(base, CARD) if is_hub_id(base) else None
    except HFValidationError:
        return None
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return None
    try:
        header = huggingface_hub.metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):
        return None
    licence = header.get("license")
    return licence if isinstance(licence, str) else None


def is_hub_id(base: str) -> bool:
    """Return whether a model's name is a hub id, and not a folder."""
    path = _path_or_none(base)
    return base.count("/") == 1 and not base.startswith((".", "~", "/")) and path is not None and not path.exists()


def _path_or_none(name: str) -> Path | None:
    """Return the path of a name, or None if the system cannot have such a path."""
    try:
        return to_path(name)
    except InputError:
        return None


def _header(base: str, head: str) -> str:
    data = huggingface_hub.ModelCardData(
        base_model=base if is_hub_id(base) else None,
        license=licence_of(base),
        library_name="transformers",
        pipeline_tag=PIPELINES[head],
        tags=["flapkit", "pruning", "structured-pruning"],
    )
    return str(data.to_yaml())


def _sentence(base: str, metadata: Mapping[str, Any]) -> str:
    of = f" of {base if is_hub_id(base) else Path(base).name}" if base else ""
    how = [_named(metadata[kind]) for kind in ("metric", "searcher", "compensator") if metadata.get(kind)]
    by = f" by {', '.join(how)}" if how else ""
    licence = licence_of(base)
    under = " The dense model's licence applies; its model card was not available." if base else ""
    if licence:
        under = f" The dense model's licence, {licence}, applies."
    return f"A structurally pruned version{of}, made with flapkit{by}.{under}"


def _named(component: Any) -> str:
    if isinstance(component, list):
        return " and ".join(_named(part) for part in component)
    return str(component["name"]) if isinstance(component, Mapping) else str(component)


MODELS = ("dense", "pruned", "recovered")
"""The models that a run measures, in the order of the card's columns."""


def _results(result: Mapping[str, Any]) -> list[str]:
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
