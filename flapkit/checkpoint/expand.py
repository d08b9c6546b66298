"""Back to the dense model: put what belongs to kept units where they stood, and zeros between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from flapkit.checkpoint.folder import PLAN
from flapkit.checkpoint.load import load_config
from flapkit.model.adapter import ArchitectureAdapter
from flapkit.model.classes import dense_config
from flapkit.model.empty import skeleton
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.registry import Registry
from flapkit.system.errors import ModelError

LORA = {"lora_A": 1, "lora_B": 0}
"""PEFT's two factors -> the dimension of the weight that each of them has: inputs or outputs."""


@dataclass(frozen=True, slots=True)
class _Dense:
    """The dense model that a checkpoint was pruned from."""

    config: PreTrainedConfig
    sites: tuple[Site, ...]
    plan: PruningPlan


def expand_lora(
    lora: Mapping[str, Tensor], checkpoint: Path | str, adapter: ArchitectureAdapter | None = None
) -> dict[str, Tensor]:
    """Map a LoRA that was trained on a pruned model to the dense model that it was pruned from.

    On the dense model it adds to the kept channels what it adds on the pruned one, and nothing to the removed.

    ```python
    from safetensors.torch import load_file, save_file

    lora = flapkit.expand_lora(load_file("lora/adapter_model.safetensors"), "pruned")
    save_file(lora, "dense-lora/adapter_model.safetensors")  # beside the same adapter_config.json
    ```

    Args:
        lora: a PEFT adapter's tensors by their names, ``base_model.model.….lora_A.weight`` [r, in] and ``lora_B``
            [out, r].
        checkpoint: the pruned checkpoint, whose plan says what was kept.
        adapter: describes the model; found by default.

    Returns:
        The tensors in the dense model's shapes, by the same names.

    Raises:
        ModelError: the checkpoint has no plan, or a tensor's shape is not the pruned model's.
    """
    dense = _dense_of(Path(checkpoint), adapter)
    found = {}
    for name, tensor in lora.items():
        module, factor = _split(name)
        found[name] = tensor
        if factor in LORA:
            found[name] = _expand(tensor, f"{module}.weight", LORA[factor], dense)
    return found


def expand_tensor(
    tensor: Tensor, name: str, checkpoint: Path | str, adapter: ArchitectureAdapter | None = None
) -> Tensor:
    """Map a parameter of a pruned model to the dense model's shape, with zeros where units were removed.

    Args:
        tensor: the parameter.
        name: its full name, for example ``model.layers.0.mlp.up_proj.weight``.
        checkpoint: the pruned checkpoint, whose plan says what was kept.
        adapter: describes the model; found by default.
    """
    dense = _dense_of(Path(checkpoint), adapter)
    for dim in range(tensor.dim()):
        tensor = _expand(tensor, name, dim, dense)
    return tensor


def _dense_of(checkpoint: Path, adapter: ArchitectureAdapter | None) -> _Dense:
    config = load_config(checkpoint)
    if not (checkpoint / PLAN).is_file():
        raise ModelError(f"{checkpoint}: holds no {PLAN}, which says what was kept of the dense model")
    plan = PruningPlan.read(checkpoint / PLAN)
    dense = dense_config(config)
    sites = (adapter or Registry.load().adapter_for(dense)).sites(dense)
    plan.check(sites)
    return _Dense(dense, sites, plan)


def _split(name: str) -> tuple[str, str]:
    """Part a PEFT tensor's name into the module and the factor."""
    path = name.removeprefix("base_model.model.").removesuffix(".weight")
    for factor in LORA:
        module, found, _ = path.partition(f".{factor}")
        if found:
            return module, factor
    return path, ""


def _expand(tensor: Tensor, param: str, dim: int, dense: _Dense) -> Tensor:
    """Spread one dimension of a tensor over the dense model's indices."""
    removed: list[int] = []
    for site in dense.sites:
        gone = dense.plan.removed_units(site)
        if site.expert is not None and gone and param in {site.weight, *(each.param for each in site.couplings)}:
            raise ModelError(f"{param}: stacked experts keep different channels, and are not mapped back")
        if site.weight == param and site.dim == dim:
            removed += site.channels_of(gone)
        for coupling in site.couplings:
            if coupling.param == param and coupling.dim == dim:
                removed += coupling.indices_of(gone)
    if not removed:
        return tensor
    length = skeleton(dense.config).get_parameter(param).shape[dim]
    kept = torch.tensor(sorted(set(range(length)) - set(removed)))
    if len(kept) != tensor.shape[dim]:
        raise ModelError(
            f"{param}: {tensor.shape[dim]} entries in dimension {dim}, where the plan keeps {len(kept)} of {length}; "
            "is it this checkpoint's, and was the model pruned once?"
        )
    shape = [*tensor.shape[:dim], length, *tensor.shape[dim + 1 :]]
    return tensor.new_zeros(shape).index_copy(dim, kept, tensor)
