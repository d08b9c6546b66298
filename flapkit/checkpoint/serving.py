"""Whether vLLM serves a pruned model, as far as its configuration and its sites show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flapkit.checkpoint.formats import MAY_REMOVE
from flapkit.model.classes import dense_config
from flapkit.model.empty import sees
from flapkit.model.site import Site

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VLLM = "0.32.0"
"""The version that was tried (docs/serving.md)."""


def vllm_obstacle(config: PreTrainedConfig, sites: Sequence[Site], *, may_remove: bool = False) -> str:
    """Return why vLLM does not serve a pruned model, or an empty text.

    Interface, Conv1D and experts are from a run of vLLM (docs/serving.md); latent attention and layers without
    attention are from its source. Layers without an MLP were not tried.

    Args:
        config: the dense or the pruned model's configuration.
        sites: its sites.
        may_remove: whether attentions and MLPs may still go altogether.
    """
    import transformers

    if sees(config):
        return "it is a vision-language model, which was not tried"
    dense = dense_config(config)
    stock: Any = transformers.AutoModelForCausalLM._model_mapping[type(dense)]
    if not stock.is_backend_compatible():
        return f"{stock.__name__} does not use transformers' attention interface"
    if any(site.kind == "mixture" for site in sites):
        return "vLLM's mixtures have the same number of experts in all layers; export to hf-stock what ul_um prunes"
    if any(site.dim == 0 for site in sites):
        return f"vLLM does not load the projections of {stock.__name__}, which are of the type Conv1D"
    if getattr(dense, "kv_lora_rank", None) is not None:
        return "vLLM's latent attention needs layers that do not differ"
    if any(site.expert is not None for site in sites):
        return "vLLM's experts have the same width in all layers"
    for kind, what in (("attention", "attention"), ("mlp", "MLP")):
        layers = {site.layer for site in sites if site.kind == kind}
        if without := [layer for layer in range(dense.num_hidden_layers) if layer not in layers]:
            return f"layer {without[0]} has no {what}"
    if may_remove:
        return f"{MAY_REMOVE}, and vLLM needs both in every layer"
    return ""
