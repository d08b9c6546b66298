"""Map tensors of a pruned model back to the dense model's shapes, with zeros for the removed units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flapkit.checkpoint.consistency import read_plan
from flapkit.checkpoint.folder import PLAN
from flapkit.checkpoint.load import load_config
from flapkit.model.classes import dense_config
from flapkit.model.declaration import declaration_of
from flapkit.model.empty import skeleton
from flapkit.model.layout import sites_of
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LORA = {"lora_A": 1, "lora_B": 0}
"""PEFT's two factors -> the dimension of the weight that they share: inputs or outputs."""


@dataclass(frozen=True, slots=True)
class _Dense:
    """The dense model that a checkpoint was pruned from."""

    config: PreTrainedConfig
    cuts: tuple[tuple[Site, list[int]], ...]


def expand_lora(lora: Mapping[str, Tensor], checkpoint: Path | str) -> dict[str, Tensor]:
    """Map a LoRA trained on a pruned model to the dense model.

    The kept channels get the same update as in the pruned model, the removed channels none.

    ```python
    from safetensors.torch import load_file, save_file

    lora = flapkit.expand_lora(load_file("lora/adapter_model.safetensors"), "pruned")
    save_file(lora, "dense-lora/adapter_model.safetensors")  # beside the same adapter_config.json
    ```

    Args:
        lora: the PEFT adapter's tensors by name: ``base_model.model.….lora_A.weight`` [r, in] and ``lora_B`` [out, r].
        checkpoint: the pruned checkpoint, with its plan.

    Returns:
        The tensors in the dense model's shapes, by the same names.

    Raises:
        ModelError: the checkpoint has no plan, or a tensor's shape is not the pruned model's.
    """
    dense = _dense_of(Path(checkpoint))
    expanded = {}
    for name, tensor in lora.items():
        module, factor = _split(name)
        expanded[name] = tensor
        if factor in LORA:
            expanded[name] = _expand(tensor, f"{module}.weight", LORA[factor], dense)
    return expanded


def expand_tensor(tensor: Tensor, name: str, checkpoint: Path | str) -> Tensor:
    """Map a parameter of a pruned model to the dense model's shape, with zeros for the removed units.

    Args:
        tensor: the parameter.
        name: its full name, for example ``model.layers.0.mlp.up_proj.weight``.
        checkpoint: the pruned checkpoint, with its plan.
    """
    dense = _dense_of(Path(checkpoint))
    for dim in range(tensor.dim()):
        tensor = _expand(tensor, name, dim, dense)
    return tensor


def _dense_of(checkpoint: Path) -> _Dense:
    config = load_config(checkpoint)
    if not (checkpoint / PLAN).is_file():
        raise ModelError(
            f"{checkpoint}: {PLAN}, the list of the kept units, is missing; give a folder that flapkit wrote"
        )
    plan = read_plan(checkpoint, config, checkpoint / PLAN)
    dense, family = dense_config(config), declaration_of(config)
    if {"experts", "mixture"} <= {block.kind for block in family.blocks}:
        raise ModelError(
            f"{checkpoint}: the model has lost whole experts, and channels of other experts; this cannot be mapped "
            "back to the dense model"
        )
    sites = sites_of(skeleton(dense), family)
    keep, single = dict(plan.keep), set()
    for site in sites:
        units = plan.keep.get(site.name, ())
        if _counts_query_heads(site, units, config.get_text_config().per_layer_config[site.layer]):
            keep[site.name] = tuple(sorted({head * site.kv_heads // site.heads for head in units}))
            single.add(site.name)
    groups = PruningPlan(keep)
    groups.check(sites)
    cuts = [(site, groups.removed_units(site)) for site in sites]
    if single:
        heads = [site for site in sites_of(skeleton(dense), family, "query_head") if site.name in single]
        cuts += [(site, plan.removed_units(site)) for site in heads]
    return _Dense(dense, tuple(cuts))


def _counts_query_heads(site: Site, keep: Sequence[int], layer: Any) -> bool:
    """Tell whether a plan counts an attention in query heads, and not in KV heads with their query heads.

    Args:
        site: the attention in the dense model, in KV heads.
        keep: its kept units.
        layer: the configuration of the pruned layer.
    """
    if site.kind != "attention" or site.units == site.heads or not keep:
        return False
    return bool(len(keep) == layer.num_attention_heads)


def _split(name: str) -> tuple[str, str]:
    """Split a PEFT tensor's name into the module and the factor."""
    path = name.removeprefix("base_model.model.").removesuffix(".weight")
    for factor in LORA:
        module, separator, _ = path.partition(f".{factor}")
        if separator:
            return module, factor
    return path, ""


def _expand(tensor: Tensor, param: str, dim: int, dense: _Dense) -> Tensor:
    """Expand one dimension of a tensor to the dense model's indices."""
    removed: list[int] = []
    for site, units in dense.cuts:
        if site.expert is not None and units and param in {site.weight, *(c.param for c in site.couplings)}:
            raise ModelError(f"{param}: stacked experts keep different channels and cannot be mapped back")
        if site.weight == param and site.dim == dim:
            removed += site.channels_of(units)
        for coupling in site.couplings:
            if coupling.param == param and coupling.dim == dim:
                removed += coupling.indices_of(units)
    if not removed:
        return tensor
    length = skeleton(dense.config).get_parameter(param).shape[dim]
    kept = torch.tensor(sorted(set(range(length)) - set(removed)))
    if len(kept) != tensor.shape[dim]:
        raise ModelError(
            f"{param}: {tensor.shape[dim]} entries in dimension {dim}, but the plan keeps {len(kept)} of {length}; "
            "check that the tensor belongs to this checkpoint"
        )
    shape = [*tensor.shape[:dim], length, *tensor.shape[dim + 1 :]]
    return tensor.new_zeros(shape).index_copy(dim, kept, tensor)
