"""What a checkpoint's parts say of each other: its configuration, its plan, and its tensors' shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig

from flapkit.model.empty import build_empty
from flapkit.model.plan import PruningPlan
from flapkit.system.errors import InputError, ModelError

ROOM = 2
"""How many times the numbers of its files a model may hold: some are computed, and none that is read is so large."""


def check_size(name: Path | str, config: PreTrainedConfig, files: Iterable[Path]) -> None:
    """Raise ``ModelError`` where a configuration describes a far larger model than the files hold.

    transformers would take the memory first, and find afterwards that weights are missing.

    Args:
        name: what the checkpoint is called.
        config: its configuration.
        files: its safetensors files; their headers alone are read.
    """
    stored = sum(math.prod(shape) for file in files for _, shape in _shapes(file))
    described = sum(parameter.numel() for parameter in build_empty(config).parameters())
    if described > ROOM * stored:
        raise ModelError(
            f"model {name}: its config.json describes a model of {described:,} parameters, its files hold {stored:,}"
        )


def check_shapes(name: Path | str, config: PreTrainedConfig, files: Iterable[Path]) -> None:
    """Raise ``ModelError`` unless every tensor of a pruned checkpoint has the shape that its configuration says.

    Args:
        name: what the checkpoint is called.
        config: its configuration.
        files: its safetensors files; their headers alone are read.
    """
    expected = {each: list(tensor.shape) for each, tensor in build_empty(config).state_dict().items()}
    for file in files:
        for each, found in _shapes(file):
            if each not in expected:
                raise ModelError(f"model {name}: {file.name} holds {each}, for which the model has no place")
            if found != expected[each]:
                raise ModelError(
                    f"model {name}: {each} in {file.name} has the shape {found}; its config.json says {expected[each]}"
                )


def _shapes(file: Path) -> list[tuple[str, list[int]]]:
    with safe_open(file, framework="pt") as tensors:
        return [(each, tensors.get_slice(each).get_shape()) for each in tensors.keys()]  # noqa: SIM118 - not a mapping


def check_settings(name: Path | str, config: Any) -> None:
    """Raise ``ModelError`` unless a pruned model's modules are told of their layer's sizes what these sizes are.

    Args:
        name: what the checkpoint is called.
        config: its configuration.
    """
    # It imports this package.
    from flapkit.model.declaration import declaration_of
    from flapkit.model.empty import skeleton
    from flapkit.model.layout import sites_of

    for site in sites_of(skeleton(config), declaration_of(config)):
        block, sizes = site.block, site.sizes(site.units)
        assert block is not None
        for what, expected in (("counts", block.counts(sizes)), ("reads", block.readings(sizes))):
            found = getattr(config.per_layer_config[site.layer], f"{block.name}_{what}", None) or {}
            if found != expected:
                raise ModelError(
                    f"model {name}: its config.json says of {site.name} {what} {found}; its sizes make that {expected}"
                )


def check_plan(name: Path | str, config: Any, path: Path) -> None:
    """Raise ``ModelError`` unless a checkpoint's plan keeps as much as its configuration says.

    Args:
        name: what the checkpoint is called.
        config: its configuration.
        path: the file of its plan.
    """
    try:
        plan = PruningPlan.read(path)
    except InputError as error:
        raise ModelError(f"model {name}: {error}") from error
    blocks = {block["name"] or block["kind"]: block for block in config.flapkit["blocks"]}
    layers = config.per_layer_config
    for site, units in plan.keep.items():
        _, layer, block = (*site.split("."), "", "", "")[:3]
        if block not in blocks or not layer.isdigit() or int(layer) >= len(layers):
            raise ModelError(f"model {name}: plan.json speaks of {site}, which the model has not")
        kept = _units(layers[int(layer)], blocks[block])
        if len(units) not in kept or list(units) != sorted(set(units)) or units[0] < 0:
            raise ModelError(
                f"model {name}: plan.json keeps {len(units)} units at {site}, its config.json "
                f"{' or '.join(str(count) for count in sorted(kept))}: one of them was changed"
            )


def _units(layer: Any, block: Any) -> set[int]:
    """Return how many units a layer's block can count as: an attention's in query heads or in key/value heads."""
    if block["kind"] != "attention":
        return {getattr(layer, block["width"])}
    return {layer.num_attention_heads, layer.num_key_value_heads}
