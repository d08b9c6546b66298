"""Export a pruned checkpoint, and show that what was written computes the same."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flapkit.checkpoint.exporter import Checkpoint, Exporter, Prospect, Runner
from flapkit.checkpoint.folder import check_output, check_output_file, new_file, new_folder
from flapkit.checkpoint.load import load, load_config, load_tokenizer
from flapkit.model.adapter import ArchitectureAdapter
from flapkit.model.classes import PREFIX
from flapkit.model.empty import skeleton
from flapkit.model.site import Kind, Site
from flapkit.registry import Registry
from flapkit.system.errors import FlapkitError, InputError, RunError
from flapkit.system.progress import Stage

TEXTS, LENGTH, GREEDY = 2, 32, 24
"""What is compared: so many texts of so many tokens, and so many tokens of greedy continuation."""

EXPORTS = "exports"
"""The folder within a checkpoint that a recipe's exports are written to."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far an exported file's logits are from the pruned model's, as transformers computes them in float32.

    Args:
        tokens: how many positions were compared.
        difference: the largest difference of a logit.
        relative: the same, as a share of the largest logit.
        same_top: share of the positions where the same token is the likeliest.
        greedy: tokens that both continue a text by greedily before they part.
        continued: how many tokens were tried.
    """

    tokens: int
    difference: float
    relative: float
    same_top: float
    greedy: int
    continued: int

    def __str__(self) -> str:
        apart = f"to {self.difference:.1e} ({self.relative:.1e} of the largest)" if self.difference else "exactly"
        return (
            f"logits of {self.tokens} tokens agree with the pruned model's {apart}; "
            f"{self.same_top:.1%} have the same likeliest token; greedy text: {self.greedy} of {self.continued} tokens"
        )


def export(
    checkpoint: Path, exporter: Exporter, output: Path, *, overwrite: bool = False, registry: Registry | None = None
) -> Agreement | None:
    """Write a pruned checkpoint in another form, run that, and compare; it appears when all of this is done.

    Args:
        checkpoint: a folder that ``flapkit.save`` wrote.
        exporter: the form.
        output: the file or folder to write.
        overwrite: replace it where it exists.
        registry: the known adapters; the installed ones if not given.

    Returns:
        What agreed to what, or None where the exporter was told not to verify.

    Raises:
        InputError: the checkpoint, the exporter or the output is not fit.
        RunError: what was written computes something else.
    """
    check_packages(exporter)
    (check_output_file if exporter.suffix else check_output)(output, overwrite=overwrite)
    config = load_config(checkpoint)
    adapter = (registry or Registry.load()).adapter_for(config)
    pruned = Checkpoint(checkpoint, prospect_of(config, adapter), _tokenizer(checkpoint))
    exporter.check(pruned.prospect)
    new = new_file if exporter.suffix else new_folder
    with new(output, overwrite=overwrite) as path:
        exporter.write(pruned, path)
        found = _verify(pruned, exporter, path) if exporter.verify else None
    return found


def export_all(checkpoint: Path, exporters: Sequence[Exporter], registry: Registry, stage: Stage) -> dict[str, str]:
    """Write the exports that a recipe asks for into a checkpoint's folder ``exports``.

    Args:
        checkpoint: a folder that ``flapkit.save`` wrote.
        exporters: the forms.
        registry: the known adapters.
        stage: is told of every export that is done.

    Returns:
        Name of the file or folder -> what agreed to what.

    Raises:
        FlapkitError: as ``export`` does; the checkpoint itself stays.
    """
    found = {}
    for exporter in exporters:
        name = exporter.label + exporter.suffix
        try:
            agreed = export(checkpoint, exporter, checkpoint / EXPORTS / name, registry=registry)
        except FlapkitError as error:
            raise type(error)(
                f"{error}; the pruned model itself is in {checkpoint}: "
                f"flapkit export {checkpoint} --to {exporter.name} --output PATH"
            ) from error
        found[name] = str(agreed) if agreed else "not verified"
        stage.advance()
    return found


def check_exports(exporters: Sequence[Exporter], prospect: Prospect) -> None:
    """Raise ``InputError`` where a recipe asks for exports that it will not get, before anything has run.

    Args:
        exporters: what the recipe asks for.
        prospect: what the pruned model will be.
    """
    labels = [exporter.label for exporter in exporters]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(f"export: {', '.join(twice)} is asked for twice; options that differ are not enough")
    for exporter in exporters:
        check_packages(exporter)
        exporter.check(prospect)


def check_packages(exporter: Exporter) -> None:
    """Raise ``InputError`` that names the extra to install where an exporter's packages are missing."""
    missing = [name for name in exporter.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"exporter {exporter.name!r} needs {' and '.join(missing)}, not installed here: "
            f'pip install "flapkit[{exporter.extra}]"'
        )


def prospect_of(config: PreTrainedConfig, adapter: ArchitectureAdapter) -> Prospect:
    """Describe a model by its configuration; no weights are read."""
    sites = adapter.sites(config)
    return Prospect(dense_type(config), config, sites, is_uniform(sites), biased_kinds(config, sites))


def dense_type(config: PreTrainedConfig) -> str:
    """Return the model type of a dense or a pruned model's dense form."""
    return config.model_type.removeprefix(PREFIX)


def biased_kinds(config: PreTrainedConfig, sites: Sequence[Site]) -> frozenset[Kind]:
    """List the kinds of sites whose consumers have a bias."""
    params = dict(skeleton(config).named_parameters())
    return frozenset(site.kind for site in sites if site.bias in params)


def is_uniform(sites: Sequence[Site]) -> bool:
    """Tell whether all layers are alike."""
    sizes: dict[str, set[tuple[int, ...]]] = {}
    for site in sites:
        role = site.block.name if site.block else site.kind
        sizes.setdefault(role, set()).add((site.units, site.heads, site.kv_heads))
    return all(len(found) == 1 for found in sizes.values())


@torch.no_grad()
def agreement(reference: Runner, exported: Runner, vocabulary: int, length: int = LENGTH) -> Agreement:
    """Compare two forms of a model on random texts, and on the text that each continues one of them by.

    Args:
        reference: runs the pruned model.
        exported: runs what was exported.
        vocabulary: tokens that the texts are drawn from.
        length: tokens of a text.
    """
    texts = torch.randint(0, vocabulary, (TEXTS, length), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([reference(text) for text in texts])
    found = torch.stack([exported(text) for text in texts])
    difference = float((expected - found).abs().max())
    ours, theirs = (_continue(run, texts[0, : length // 4], GREEDY) for run in (reference, exported))
    parted = next((place for place in range(GREEDY) if ours[place] != theirs[place]), GREEDY)
    same_top = (expected.argmax(-1) == found.argmax(-1)).double().mean()
    largest = float(expected.abs().max())
    return Agreement(texts.numel(), difference, difference / largest, float(same_top), parted, GREEDY)


def _continue(run: Runner, tokens: Tensor, count: int) -> list[int]:
    """Continue a text by the likeliest tokens."""
    for _ in range(count):
        tokens = torch.cat([tokens, run(tokens)[-1:].argmax(-1)])
    return tokens[-count:].tolist()


def _verify(pruned: Checkpoint, exporter: Exporter, path: Path) -> Agreement:
    """Run both, and refuse what differs by more than the exporter says it may."""
    config = pruned.prospect.config
    model = load(pruned.folder, "float32")
    with exporter.open(path) as exported:
        found = agreement(
            lambda tokens: model(tokens[None], use_cache=False).logits[0],
            exported,
            config.vocab_size,
            min(LENGTH, (getattr(config, "max_position_embeddings", None) or 2 * LENGTH) - GREEDY),
        )
    if not math.isfinite(found.difference) or found.relative > (exporter.tolerance or math.inf):
        raise RunError(
            f"export {exporter.name}: what was written differs from the pruned model: {found}; "
            f"at most {exporter.tolerance:.0e} of the largest logit was expected; nothing is left of it"
        )
    return found


def _tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase | None:
    """Load the checkpoint's tokenizer where it has one."""
    return load_tokenizer(checkpoint) if (checkpoint / "tokenizer_config.json").is_file() else None
