"""Save a pruned model as a folder that transformers loads, with the metadata of how it was made."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flapkit.checkpoint.card import CARD, model_card
from flapkit.checkpoint.folder import LAYERS, LOCAL_RECIPE, MARK, PLAN, RECIPE, new_folder
from flapkit.checkpoint.load import restore_plan_
from flapkit.checkpoint.modeling_file import ENTRY, sha256_of
from flapkit.checkpoint.sizes import layer_sizes
from flapkit.checkpoint.weights import INDEX, Weights
from flapkit.model.classes import PrunedClasses, check_head, pruned_classes
from flapkit.model.costs import bytes_of
from flapkit.model.history import plan_of
from flapkit.model.plan import PruningPlan
from flapkit.model.precision import convert_
from flapkit.model.soundness import check_finite
from flapkit.system.errors import InputError, ModelError
from flapkit.system.paths import within
from flapkit.system.workdir import OVERWRITE, WorkDir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

PACKAGES = ("flapkit", "torch", "transformers", "lightning", "safetensors")

TEXTS = ("result.json", RECIPE)
"""The files that the model card quotes."""

DIVERGED = (
    "nothing was written. If the model was trained, train it again with a lower learning rate, and in float32 "
    "(`model.float()`) or in mixed precision: in float16, most optimizers fail"
)

log = logging.getLogger(__name__)


def save(
    model: PreTrainedModel,
    path: Path | str,
    plan: PruningPlan | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    base: str = "",
    metadata: Mapping[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    max_shard_size: str = "5GB",
    weights: Sequence[Path] = (),
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    work: WorkDir | None = None,
) -> None:
    """Save a pruned model as a folder, which appears only when it is complete.

    It contains safetensors, a configuration with transformers' ``per_layer_config``, the modeling file for
    ``trust_remote_code=True``, a model card, ``plan.json`` (the kept units as indices into the dense model, after one
    pruning or several: the model carries them) and ``flapkit.json`` (versions, metadata, and the sizes
    of the layers). Nothing is pickled.

    Args:
        model: a model that flapkit pruned.
        path: the folder to write.
        plan: what is to be the model's plan; another one is refused.
        tokenizer: saved with the model, if given: its tokenizer, or the processor of a vision-language model.
        base: the dense model, a hub id or a folder, for the model card; by default where the model came from.
        metadata: how the model was made, for ``flapkit.json``; JSON data.
        files: name -> content of additional files; a name may contain subfolders.
        max_shard_size: maximum size of a weight file; larger models are split over several.
        weights: safetensors files with the model's weights. They are hard-linked into the folder, or moved if the file
            system has no hard links; the model itself may then be empty.
        dtype: type of the written weights, to which the model is converted; that of the model if not given.
        overwrite: replace a folder that flapkit wrote.
        work: the folder's work folder, if it is already open (``flapkit.system.workdir``).

    Raises:
        ModelError: flapkit has no classes to load such a model, or its weights are not finite.
        InputError: the plan is not the model's.
        OutputError: the folder exists, cannot be written, or another process writes it.
    """
    classes = savable_classes(model)
    head, carried = check_head(model), _plan_of(model, plan)
    if dtype is not None and not weights:
        convert_(model, dtype)
    for name, parameter in model.named_parameters():
        check_finite(f"save: {name}", parameter, DIVERGED)
    needed = sum(map(len, (files or {}).values())) + (0 if weights else bytes_of(model))
    # Commands open the work folder themselves.
    option = OVERWRITE if work else "overwrite=True"
    with new_folder(Path(path), overwrite=overwrite, work=work, needed=needed, option=option) as folder:
        fix_generation_config_(model)
        if weights:
            model.config.dtype = dtype or model.dtype
            _take_weights(model, weights, folder)
        else:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        _write_config(classes, head, folder)
        source = classes.source
        (folder / classes.file).write_text(source, encoding="utf-8", newline="\n")
        modeling = {classes.file: sha256_of(source)}
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if carried is not None:
            (folder / PLAN).write_text(carried.to_json(), encoding="utf-8")
        said = {**(metadata or {}), ENTRY: modeling}
        card = _card(Path(path).name, base, model, said, files or {}, has_plan=carried is not None, head=head)
        (folder / CARD).write_text(card, encoding="utf-8")
        for name, content in (files or {}).items():
            path = within(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        published = sorted(name for name in files or () if name != LOCAL_RECIPE)
        record = {"versions": {package: version(package) for package in PACKAGES}, "files": published}
        record |= {**said, LAYERS: layer_sizes(model.config)}
        (folder / MARK).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _plan_of(model: PreTrainedModel, claimed: PruningPlan | None) -> PruningPlan | None:
    """Return the plan that a model carries, or None, with a warning, where it carries none.

    Raises:
        InputError: another plan is claimed to be the model's.
    """
    restore_plan_(model)
    plan = plan_of(model)
    if claimed is not None and claimed != plan:
        raise InputError(
            "save: this plan is not the model's, which was pruned by another plan, or more than once; leave out "
            "`plan`, because the model has its own"
        )
    if plan is None:
        log.warning(
            "save: the units that the model keeps of the dense one are unknown, because it was loaded from a folder "
            "without %s, as save_pretrained writes it; the new folder has no %s either",
            PLAN,
            PLAN,
        )
    return plan


def _take_weights(model: PreTrainedModel, weights: Sequence[Path], folder: Path) -> None:
    """Do what ``save_pretrained`` does, with weight files that exist already."""
    taken = [folder / file.name for file in weights]
    for file, place in zip(weights, taken, strict=True):
        try:
            # A link, so that the file stays in place if the folder is never finished.
            place.hardlink_to(file)
        except OSError:
            file.rename(place)
    (folder / INDEX).write_text(Weights.of(taken).index(), encoding="utf-8")
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _card(
    name: str,
    base: str,
    model: PreTrainedModel,
    metadata: Mapping[str, Any],
    files: Mapping[str, str | bytes],
    *,
    has_plan: bool,
    head: str,
) -> str:
    base = base or metadata.get("model", {}).get("path") or str(model.config.name_or_path or "")
    texts = {key: value.decode() if isinstance(value, bytes) else value for key, value in files.items() if key in TEXTS}
    result = json.loads(texts["result.json"]) if "result.json" in texts else None
    text = texts.get(RECIPE)
    return model_card(name, base, metadata=metadata, result=result, recipe=text, has_plan=has_plan, head=head)


def savable_classes(model: PreTrainedModel) -> PrunedClasses:
    """Return the classes that load a pruned model.

    Raises:
        ModelError: there are no such classes, or flapkit did not prune the model.
    """
    classes = pruned_classes(model.config.model_type)
    if classes is None or not isinstance(model.config, classes.config):
        raise ModelError(
            f"the configuration of this {type(model).__name__} has no sizes per layer: flapkit did not prune it, or "
            "the adapter has no declaration; use the model's own save_pretrained"
        )
    return classes


def fix_generation_config_(model: PreTrainedModel) -> None:
    """Set ``do_sample`` if the generation settings have sampling options; transformers does not save them otherwise."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        log.warning("generation_config: do_sample is now set, since sampling options cannot be saved without it")
        settings.do_sample = True


def _write_config(classes: PrunedClasses, head: str, folder: Path) -> None:
    """Add the entries that only a checkpoint has to the configuration: its class and its modeling file."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"architectures": [classes.heads[head].__name__], "auto_map": classes.auto_map}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
