"""Export a pruned checkpoint, and check that the exported model computes the same."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flapkit.checkpoint.folder import check_output, check_output_file, new_file, new_folder
from flapkit.checkpoint.formats import Checkpoint, Exporter, Prospect, Runner
from flapkit.checkpoint.load import load, load_config, load_tokenizer
from flapkit.model.declaration import declaration_of
from flapkit.model.empty import sees, skeleton
from flapkit.model.layout import removed_blocks, sites_of
from flapkit.model.positions import context_length
from flapkit.model.registration import dense_type
from flapkit.model.site import Kind, Site
from flapkit.system.errors import FlapkitError, InputError, ModelError, RunError
from flapkit.system.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TEXTS, LENGTH, GREEDY = 2, 32, 24
"""Size of the comparison: number of texts, tokens per text, and greedily generated tokens."""

EXPORTS = "exports"
"""The folder within a checkpoint for a recipe's exports."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well an exported model's logits agree with the pruned model's, computed by transformers in float32.

    Args:
        tokens: number of positions compared.
        difference: the largest difference of a logit.
        relative: the same, as a fraction of the largest logit.
        same_top: fraction of positions with the same most likely token.
        greedy: number of greedily generated tokens before the first difference.
        continued: number of greedily generated tokens.
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
            f"{self.same_top:.1%} have the same top token; greedy text: {self.greedy} of {self.continued} tokens agree"
        )


def export(checkpoint: Path, exporter: Exporter, output: Path, *, overwrite: bool = False) -> Agreement | None:
    """Write a pruned checkpoint in another format, run the result, and compare it; the output appears when all is done.

    Args:
        checkpoint: a folder that ``flapkit.save`` wrote.
        exporter: the format.
        output: the file or folder to write.
        overwrite: replace an existing output.

    Returns:
        How well the results agree, or None if the exporter does not verify.

    Raises:
        InputError: the checkpoint, the exporter or the output is unsuitable.
        RunError: the exported model computes something else.
    """
    (check_output_file if exporter.suffix else check_output)(output, overwrite=overwrite)
    config = load_config(checkpoint)
    sites = sites_of(skeleton(config), declaration_of(config))
    pruned = Checkpoint(checkpoint, prospect_of(config, sites), _tokenizer(checkpoint))
    _check_form(exporter, pruned.prospect)
    check_packages(exporter)
    new = new_file if exporter.suffix else new_folder
    with new(output, overwrite=overwrite) as path:
        exporter.write(pruned, path)
        agreed = _verify(pruned, exporter, path) if exporter.verify else None
    return agreed


def export_all(checkpoint: Path, exporters: Sequence[Exporter], progress: Progress) -> dict[str, str]:
    """Write a recipe's exports into a checkpoint's folder ``exports``.

    Args:
        checkpoint: a folder that ``flapkit.save`` wrote.
        exporters: the formats.
        progress: has a stage for them, if there are any.

    Returns:
        Name of the file or folder -> how well the results agree.

    Raises:
        FlapkitError: as ``export`` does; the checkpoint itself is kept.
    """
    if not exporters:
        return {}
    agreements = {}
    with progress.stage("export", len(exporters), "exports") as stage:
        for exporter in exporters:
            name = exporter.label + exporter.suffix
            try:
                agreed = export(checkpoint, exporter, checkpoint / EXPORTS / name)
            except FlapkitError as error:
                raise type(error)(
                    f"{error}; the pruned model itself is saved in {checkpoint}; to export it again: "
                    f"flapkit export {checkpoint} --to {exporter.name} --output PATH"
                ) from error
            agreements[name] = str(agreed) if agreed else "not verified"
            stage.advance()
    return agreements


def check_exports(exporters: Sequence[Exporter], prospect: Prospect) -> None:
    """Raise ``InputError`` if a recipe's exports will fail, before anything has run.

    Args:
        exporters: the recipe's exports.
        prospect: the pruned model as far as it is known.
    """
    labels = [exporter.label for exporter in exporters]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(f"export: {', '.join(twice)} is listed twice, and both would write the same file; remove one")
    for exporter in exporters:
        _check_form(exporter, prospect)
        check_packages(exporter)


def _check_form(exporter: Exporter, prospect: Prospect) -> None:
    """Raise ``ModelError`` if a format cannot hold a model."""
    if sees(prospect.config) and not exporter.sees:
        raise ModelError(
            f"export {exporter.name}: models of type {prospect.family!r} have a vision tower, which this format is not "
            "written for; export to hf"
        )
    exporter.check(prospect)


def check_packages(exporter: Exporter) -> None:
    """Raise ``InputError``, naming the extra to install, if an exporter's packages are missing."""
    missing = [name for name in exporter.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"exporter {exporter.name!r} needs {' and '.join(missing)}; install with: "
            f'pip install "flapkit[{exporter.extra}]"'
        )


def prospect_of(config: PreTrainedConfig, sites: tuple[Site, ...]) -> Prospect:
    """Describe a model from its configuration and its sites, without reading weights."""
    removed = removed_blocks(skeleton(config))
    uniform = is_uniform(sites) and not removed
    return Prospect(dense_type(config.model_type), config, sites, uniform, biased_kinds(config, sites), removed=removed)


def biased_kinds(config: PreTrainedConfig, sites: Sequence[Site]) -> frozenset[Kind]:
    """Return the kinds of sites whose consumers have a bias."""
    params = dict(skeleton(config).named_parameters())
    return frozenset(site.kind for site in sites if site.kind != "mixture" and site.bias in params)


def is_uniform(sites: Sequence[Site]) -> bool:
    """Return whether all layers have the same sizes."""
    sizes: dict[str, set[tuple[int, ...]]] = {}
    for site in sites:
        sizes.setdefault(site.block_name, set()).add((site.units, site.heads, site.kv_heads))
    return all(len(distinct) == 1 for distinct in sizes.values())


@torch.no_grad()
def agreement(reference: Runner, exported: Runner, vocabulary: int, length: int = LENGTH) -> Agreement:
    """Compare two forms of a model on random texts and on a greedy continuation.

    Args:
        reference: runs the pruned model.
        exported: runs the exported model.
        vocabulary: size of the vocabulary to draw the texts from.
        length: tokens per text.
    """
    texts = torch.randint(0, vocabulary, (TEXTS, length), generator=torch.Generator().manual_seed(0))
    expected = torch.stack([reference(text) for text in texts])
    logits = torch.stack([exported(text) for text in texts])
    difference = float((expected - logits).abs().max())
    ours, theirs = (_continue(run, texts[0, : length // 4], GREEDY) for run in (reference, exported))
    agreed = next((index for index in range(GREEDY) if ours[index] != theirs[index]), GREEDY)
    same_top = (expected.argmax(-1) == logits.argmax(-1)).double().mean()
    largest = float(expected.abs().max())
    return Agreement(texts.numel(), difference, difference / largest, float(same_top), agreed, GREEDY)


def _continue(run: Runner, tokens: Tensor, count: int) -> list[int]:
    """Continue a text greedily."""
    for _ in range(count):
        tokens = torch.cat([tokens, run(tokens)[-1:].argmax(-1)])
    return tokens[-count:].tolist()


def _verify(pruned: Checkpoint, exporter: Exporter, path: Path) -> Agreement:
    """Compare the exported with the pruned model; raise ``RunError`` beyond the exporter's tolerance."""
    config = pruned.prospect.config
    model = load(pruned.folder, "float32")
    with exporter.open(path) as exported:
        agreed = agreement(
            lambda tokens: model(tokens[None], use_cache=False).logits[0],
            exported,
            config.get_text_config().vocab_size,
            min(LENGTH, (context_length(config) or 2 * LENGTH) - GREEDY),
        )
    if not math.isfinite(agreed.difference) or agreed.relative > (exporter.tolerance or math.inf):
        raise RunError(
            f"export {exporter.name}: the exported model differs from the pruned model: {agreed}; "
            f"allowed: {exporter.tolerance:.0e} of the largest logit; the export was removed"
        )
    return agreed


def _tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase | None:
    """Load the checkpoint's tokenizer, if it has one."""
    return load_tokenizer(checkpoint) if (checkpoint / "tokenizer_config.json").is_file() else None
