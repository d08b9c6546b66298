"""Check that the parts of a checkpoint fit each other: configuration, plan, and the tensors' shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from flapkit.model.declaration import declaration_of
from flapkit.model.empty import build_empty, skeleton
from flapkit.model.history import is_removed
from flapkit.model.layout import sites_of
from flapkit.model.plan import PruningPlan
from flapkit.system.errors import InputError, ModelError
from flapkit.system.sizes import counted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MAX_SIZE_RATIO = 2
"""Largest ratio of the model's parameters to those in its files; models may compute some parameters."""


def check_size(name: Path | str, config: PreTrainedConfig, files: Iterable[Path]) -> None:
    """Raise ``ModelError`` if a configuration describes a far larger model than the files contain.

    transformers would allocate the memory first, and notice the missing weights later.

    Args:
        name: the checkpoint's name.
        config: its configuration.
        files: its safetensors files; only their headers are read.
    """
    stored = sum(math.prod(shape) for file in files for _, shape in _shapes(file))
    described = sum(parameter.numel() for parameter in build_empty(config).parameters())
    if described > MAX_SIZE_RATIO * stored:
        raise ModelError(
            f"model {name}: config.json describes {described:,} parameters, but the files contain {stored:,}; download "
            "or write the model again"
        )


def check_shapes(name: Path | str, config: PreTrainedConfig, files: Iterable[Path]) -> None:
    """Raise ``ModelError`` unless every tensor of a pruned checkpoint has the shape that its configuration implies.

    Args:
        name: the checkpoint's name.
        config: its configuration.
        files: its safetensors files; only their headers are read.
    """
    expected = {param: list(tensor.shape) for param, tensor in build_empty(config).state_dict().items()}
    for file in files:
        for param, shape in _shapes(file):
            if param not in expected:
                raise ModelError(f"model {name}: {file.name} contains {param}, which the model does not have")
            if shape != expected[param]:
                raise ModelError(
                    f"model {name}: {param} in {file.name} has the shape {shape}, but config.json implies "
                    f"{expected[param]}"
                )


def _shapes(file: Path) -> list[tuple[str, list[int]]]:
    with safe_open(file, framework="pt") as tensors:
        return [(param, tensors.get_slice(param).get_shape()) for param in tensors.keys()]  # noqa: SIM118 - no mapping


def check_settings(name: Path | str, config: Any) -> None:
    """Raise ``ModelError`` unless the size attributes in a pruned model's configuration fit each layer's sizes.

    Args:
        name: the checkpoint's name.
        config: its configuration.
    """
    for site in sites_of(skeleton(config), declaration_of(config)):
        block, sizes = site.block, site.sizes(site.units)
        assert block is not None
        for what, expected in (("counts", block.counts(sizes)), ("reads", block.readings(sizes))):
            stored = getattr(config.get_text_config().per_layer_config[site.layer], f"{block.name}_{what}", None) or {}
            if stored != expected:
                raise ModelError(
                    f"model {name}: config.json has {block.name}_{what} {stored} for {site.name}; its sizes imply "
                    f"{expected}"
                )


def read_plan(name: Path | str, config: Any, path: Path) -> PruningPlan:
    """Read a checkpoint's plan.

    Args:
        name: the checkpoint's name.
        config: its configuration.
        path: the plan's file.

    Raises:
        ModelError: the plan is damaged, or does not keep as many units as the configuration implies.
    """
    try:
        plan = PruningPlan.read(path)
    except InputError as error:
        raise ModelError(f"model {name}: {error}") from error
    blocks = {block["name"] or block["kind"]: block for block in config.flapkit["blocks"]}
    layers = config.get_text_config().per_layer_config
    for site, units in plan.keep.items():
        _, layer, block = (*site.split("."), "", "", "")[:3]
        if block not in blocks or not layer.isdigit() or int(layer) >= len(layers):
            raise ModelError(f"model {name}: plan.json names the site {site}, which the model does not have")
        kept = {0} if is_removed(site, plan.keep) and not units else _units(layers[int(layer)], blocks[block])
        if len(units) not in kept or list(units) != sorted(set(units)) or min(units, default=0) < 0:
            raise ModelError(
                f"model {name}: plan.json keeps {counted(len(units), 'unit')} at {site}, config.json "
                f"{' or '.join(str(count) for count in sorted(kept))}; one of the files was changed"
            )
    return plan


def _units(layer: Any, block: Any) -> set[int]:
    """Return the possible numbers of units of a layer's block: an attention's unit may be a query or a KV head."""
    if block["kind"] != "attention":
        return {getattr(layer, block["width"])}
    return {layer.num_attention_heads, layer.num_key_value_heads}
