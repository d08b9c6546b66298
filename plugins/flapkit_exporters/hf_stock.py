"""Hugging Face's stock classes: a pruned model with layers of equal size loads without custom code."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field

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

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LIKE_LLAMA = ("llama", "mistral", "qwen2", "seed_oss")
"""Families that compute what LLaMA's and Seed-OSS's classes compute, so that these can hold their weights."""

FLAGS = ("attention_bias", "attention_out_bias", "mlp_bias", "use_bias")
"""Configuration entries that add biases."""

Form = Literal["auto", "own", "llama", "seed_oss"]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class HuggingFaceStock(Exporter):
    """transformers' stock classes, for models with layers of equal size: no custom code, no `trust_remote_code`.

    Args:
        form: the classes: the family's own, LLaMA's, or Seed-OSS's, which have biases where compensators add them.
        pad: pad every layer with zeros to the widest one; the result is the same.
        dtype: data type of the weights.
    """

    name = "hf-stock"

    form: Annotated[
        Form,
        Field(
            description="The classes: the family's `own`, `llama` (the heads must divide the hidden size) or "
            "`seed_oss` (any number of heads); `auto` uses the first that fits."
        ),
    ] = "auto"
    pad: Annotated[bool, Field(description="Pad every layer with zeros to the widest one.")] = False
    dtype: Annotated[DType, Field(description="Data type of the weights; `auto` is that of the checkpoint.")] = "auto"

    @property
    def tolerance(self) -> float:
        """The effect of rounding the weights; padding and another order of operations have almost none."""
        return max(1e-5, HuggingFace(dtype=self.dtype).tolerance)

    def check(self, prospect: Prospect) -> None:
        """Refuse layers of different sizes, and sizes or biases that the stock classes do not support."""
        if prospect.without:
            raise ModelError(
                f"export hf-stock: {prospect.without}, and the stock classes have all attentions and MLPs; export to "
                "hf, or prune with a searcher that leaves units everywhere (min_units: 1, not depth)"
            )
        dense = not hasattr(prospect.config, "flapkit")
        if not prospect.uniform and not self.pad:
            raise ModelError(
                "export hf-stock: stock classes need layers of equal size, and these differ; choose a searcher that "
                "prunes all layers equally (ul_*), or set pad: true"
            )
        if dense and not prospect.uniform and any(site.runs > 1 for site in prospect.sites if site.kind == "attention"):
            raise ModelError(
                "export hf-stock: layers that keep different numbers of query heads for a key/value head cannot be "
                "padded; prune whole key/value groups (unit: kv_group)"
            )
        # The sizes are unknown before a run: check with one unit less at every site.
        sizes = {site.name: one_less(site) for site in prospect.sites} if dense else widest(prospect.sites)
        self._config(prospect, sizes)

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Load the pruned weights into the stock model, and save it."""
        import transformers
        from transformers.initialization import no_init_weights

        prospect = checkpoint.prospect
        sizes = widest(prospect.sites)
        config = self._config(prospect, sizes)
        dtype = prospect.config.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        pad = padder(prospect, sizes)
        weights = {name: pad(name, tensor).to(dtype) for name, tensor in open_weights(checkpoint.folder).items()}
        with no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        zeros = {name: torch.zeros_like(old) for name, old in model.named_parameters() if name not in weights}
        model.load_state_dict({**zeros, **weights}, strict=False, assign=True)
        model.tie_weights()
        model.generation_config = load(checkpoint.folder, "auto").generation_config
        model.save_pretrained(path)
        copy_beside(checkpoint.folder, path, "config.json", "generation_config.json", "modeling_*.py")

    @contextmanager
    def open(self, path: Path) -> Iterator[Runner]:
        """Load the folder with transformers' stock classes."""
        with HuggingFace().open(path) as run:
            yield run

    def _config(self, prospect: Prospect, sizes: Mapping[str, Sizes]) -> PreTrainedConfig:
        """Find the configuration of a stock model that the weights fit.

        Raises:
            ModelError: there is none; the message says what to do.
        """
        wanted, biases = _shapes(prospect, sizes)
        keys = _keys(prospect.sites, sizes)
        candidates = list(self._candidates(prospect, keys))
        for config in candidates:
            if _holds(config, {**wanted, **biases}):
                return config
        if any(_holds(config, wanted) for config in candidates):
            raise ModelError(
                f"export hf-stock: the stock classes of {prospect.family!r} lack the biases that the compensator adds; "
                "use the compensator {name: least_squares, intercept: false} or none, or export to hf"
            )
        raise ModelError(
            f"export hf-stock: the stock classes of {prospect.family!r} do not support these numbers of heads or "
            f"channels ({', '.join(f'{name} {size}' for name, size in keys.items())}); prune only mlp, or export to hf"
        )

    def _candidates(self, prospect: Prospect, keys: Mapping[str, int]) -> Iterator[PreTrainedConfig]:
        import transformers

        config = {key: value for key, value in prospect.config.to_dict().items() if key not in PRUNED_KEYS}
        forms = [prospect.family] if self.form in ("auto", "own") else []
        slides = config.get("sliding_window") and config.get("use_sliding_window", True)
        if prospect.family in LIKE_LLAMA and not slides:
            forms += [form for form in ("llama", "seed_oss") if self.form in ("auto", form)]
        for form in dict.fromkeys(forms):
            stock = transformers.AutoConfig.for_model(form)
            flags = [flag for flag in FLAGS if hasattr(stock, flag)]
            # Some classes compute the head size themselves, and do not accept it.
            accepted = {
                key: size for key, size in keys.items() if not isinstance(getattr(type(stock), key, None), property)
            }
            for count in range(len(flags) + 1):
                for chosen in itertools.combinations(flags, count):
                    try:
                        yield transformers.AutoConfig.for_model(
                            form, **{**config, **accepted, **dict.fromkeys(chosen, True)}
                        )
                    except (StrictDataclassError, ValueError):
                        # For example, heads that do not divide the hidden size.
                        continue


def _keys(sites: tuple[Site, ...], sizes: Mapping[str, Sizes]) -> dict[str, int]:
    """Return the configuration entries for the layers' sizes."""
    keys: dict[str, int] = {}
    for site in sites:
        block: Any = site.block
        wanted = sizes[site.name]
        if site.kind != "attention":
            (keys[block.width],) = wanted.values()
            continue
        keys |= {block.heads: wanted["H"], "head_dim": site.channels // site.heads}
        if isinstance(block.kv_heads, str):
            keys[block.kv_heads] = wanted["K"]
    return keys


def _shapes(prospect: Prospect, sizes: Mapping[str, Sizes]) -> tuple[Shapes, Shapes]:
    """Return the shapes of a pruned model's parameters, and separately those of the consumers' biases."""
    shapes = {name: list(old.shape) for name, old in skeleton(prospect.config).named_parameters()}
    for (param, dim), (_, length) in lengths(prospect, sizes).items():
        if param in shapes:
            # Not a buffer.
            shapes[param][dim] = length
    biases: Shapes = {}
    for site in prospect.sites:
        if site.kind != "mixture" and (site.bias in shapes or (site.kind in prospect.biases and site.expert is None)):
            shapes.pop(site.bias, None)
            biases[site.bias] = (site.out_features,)
    return {name: tuple(shape) for name, shape in shapes.items()}, biases


def _holds(config: PreTrainedConfig, wanted: Shapes) -> bool:
    """Return whether a stock model has these parameters, and no others but biases."""
    try:
        shapes = {name: tuple(old.shape) for name, old in skeleton(config).named_parameters()}
    except (ModelError, ValueError, RuntimeError):
        # The stock class cannot be built with these sizes.
        return False
    added = [name for name in shapes if name not in wanted]
    return all(shapes.get(name) == shape for name, shape in wanted.items()) and all(n.endswith("bias") for n in added)
