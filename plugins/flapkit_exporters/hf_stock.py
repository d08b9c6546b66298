"""Hugging Face's stock classes: a pruned model whose layers are alike loads with no custom code anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from flapkit.interfaces import (
    PRUNED_KEYS,
    Checkpoint,
    DType,
    Exporter,
    ModelError,
    Prospect,
    Runner,
    Site,
    load,
    open_weights,
    skeleton,
)
from flapkit_exporters.hf import HuggingFace, copy_beside
from flapkit_exporters.padding import Sizes, lengths, one_less, padder, widest

LIKE_LLAMA = ("llama", "mistral", "qwen2", "seed_oss")
"""Families that compute what LLaMA's and Seed-OSS's classes compute, so that these can hold their weights."""

FLAGS = ("attention_bias", "attention_out_bias", "mlp_bias", "use_bias")
"""Names under which configurations can ask for biases."""

Form = Literal["auto", "own", "llama", "seed_oss"]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class HuggingFaceStock(Exporter):
    """transformers' stock classes, for models whose layers are alike: no custom code, no `trust_remote_code`.

    Args:
        form: the classes: the family's own, LLaMA's, or Seed-OSS's, which have a bias wherever pruning puts one.
        pad: zeros widen every layer to the widest, which computes the same.
        dtype: type of the weights.
    """

    name = "hf-stock"

    form: Annotated[
        Form,
        Field(
            description="Whose classes: the family's `own`, `llama`'s (where the heads divide the hidden size) or "
            "`seed_oss`'s (any number of heads); `auto` takes the first that fits."
        ),
    ] = "auto"
    pad: Annotated[bool, Field(description="Widen every layer to the widest by zeros; it computes the same.")] = False
    dtype: Annotated[DType, Field(description="Type of the weights; `auto` is the checkpoint's own.")] = "auto"

    @property
    def tolerance(self) -> float:
        """Zeros and another class's order of operations cost next to nothing; fewer bits cost what they do."""
        return max(1e-5, HuggingFace(dtype=self.dtype).tolerance)

    def check(self, prospect: Prospect) -> None:
        """Refuse layers that differ, and families whose stock classes cannot hold the heads or the biases."""
        dense = not hasattr(prospect.config, "flapkit")
        if not prospect.uniform and not self.pad:
            raise ModelError(
                "export hf-stock: stock classes have one size for all layers, and these differ; choose a searcher that "
                "prunes all layers alike (ul_*), or give pad: true"
            )
        # Before a run the sizes are not known: one unit less everywhere stands for any.
        sizes = {site.name: one_less(site) for site in prospect.sites} if dense else widest(prospect.sites)
        self._config(prospect, sizes)

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Fill the stock model with the pruned weights, and save it."""
        prospect = checkpoint.prospect
        sizes = widest(prospect.sites)
        config = self._config(prospect, sizes)
        dtype = prospect.config.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        pad = padder(prospect, sizes)
        weights = {name: pad(name, tensor).to(dtype) for name, tensor in open_weights(checkpoint.folder).items()}
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        zeros = {name: torch.zeros_like(old) for name, old in model.named_parameters() if name not in weights}
        model.load_state_dict({**zeros, **weights}, strict=False, assign=True)
        model.tie_weights()
        model.generation_config = load(checkpoint.folder, "auto").generation_config
        model.save_pretrained(path)
        copy_beside(checkpoint.folder, path, "config.json", "generation_config.json", "modeling_*.py")

    @contextmanager
    def open(self, path: Path) -> Iterator[Runner]:
        """Load it through transformers, which knows nothing of flapkit's classes here."""
        with HuggingFace().open(path) as run:
            yield run

    def _config(self, prospect: Prospect, sizes: Mapping[str, Sizes]) -> PreTrainedConfig:
        """Find the configuration of a stock model that holds the weights.

        Raises:
            ModelError: there is none, with the way out.
        """
        wanted, biases = _shapes(prospect, sizes)
        keys = _keys(prospect.sites, sizes)
        candidates = list(self._candidates(prospect, keys))
        for config in candidates:
            if _holds(config, {**wanted, **biases}):
                return config
        if any(_holds(config, wanted) for config in candidates):
            raise ModelError(
                f"export hf-stock: the stock classes of {prospect.family!r} hold no bias where pruning puts one; "
                "repair by {name: least_squares, intercept: false}, or by none, or export to hf"
            )
        raise ModelError(
            f"export hf-stock: the stock classes of {prospect.family!r} take no such numbers of heads or channels "
            f"({', '.join(f'{name} {size}' for name, size in keys.items())}); prune mlp alone, or export to hf"
        )

    def _candidates(self, prospect: Prospect, keys: Mapping[str, int]) -> Iterator[PreTrainedConfig]:
        config = {key: value for key, value in prospect.config.to_dict().items() if key not in PRUNED_KEYS}
        forms = [prospect.family] if self.form in ("auto", "own") else []
        slides = config.get("sliding_window") and config.get("use_sliding_window", True)
        if prospect.family in LIKE_LLAMA and not slides:
            forms += [form for form in ("llama", "seed_oss") if self.form in ("auto", form)]
        for form in dict.fromkeys(forms):
            stock = AutoConfig.for_model(form)
            flags = [flag for flag in FLAGS if hasattr(stock, flag)]
            # Some work the width of a head out themselves, and would refuse to be told.
            given = {
                key: size for key, size in keys.items() if not isinstance(getattr(type(stock), key, None), property)
            }
            for count in range(len(flags) + 1):
                for chosen in itertools.combinations(flags, count):
                    try:
                        yield AutoConfig.for_model(form, **{**config, **given, **dict.fromkeys(chosen, True)})
                    except (StrictDataclassError, ValueError):
                        # Such as heads that do not divide the hidden size: not a form for this model.
                        continue


def _keys(sites: tuple[Site, ...], sizes: Mapping[str, Sizes]) -> dict[str, int]:
    """Return what a configuration says of the layers' sizes, by the configuration's own names."""
    keys: dict[str, int] = {}
    for site in sites:
        block: Any = site.block
        wanted = sizes[site.name]
        if site.kind == "mlp":
            keys[block.width] = wanted["I"]
            continue
        keys |= {block.heads: wanted["H"], "head_dim": site.channels // site.heads}
        if isinstance(block.kv_heads, str):
            keys[block.kv_heads] = wanted["K"]
    return keys


def _shapes(prospect: Prospect, sizes: Mapping[str, Sizes]) -> tuple[Shapes, Shapes]:
    """Return the shapes of a pruned model's parameters, and apart from them those of the consumers' biases."""
    shapes = {name: list(old.shape) for name, old in skeleton(prospect.config).named_parameters()}
    for (param, dim), (_, length) in lengths(prospect, sizes).items():
        shapes[param][dim] = length
    biases: Shapes = {}
    for site in prospect.sites:
        if site.bias in shapes or (site.kind in prospect.biases and site.expert is None):
            shapes.pop(site.bias, None)
            biases[site.bias] = (site.out_features,)
    return {name: tuple(shape) for name, shape in shapes.items()}, biases


def _holds(config: PreTrainedConfig, wanted: Shapes) -> bool:
    """Tell whether a stock model has these parameters, and beside them nothing but biases."""
    try:
        found = {name: tuple(old.shape) for name, old in skeleton(config).named_parameters()}
    except (ModelError, ValueError, RuntimeError):
        # The stock class cannot even be built with such sizes.
        return False
    added = [name for name in found if name not in wanted]
    return all(found.get(name) == shape for name, shape in wanted.items()) and all(n.endswith("bias") for n in added)
