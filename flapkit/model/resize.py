"""Resize the decoder layers of a stock transformers model to the heads and widths of a pruned one.

This file is part of flapkit. Every checkpoint that flapkit writes contains a copy, for ``trust_remote_code=True``. In
the configuration, ``flapkit`` declares the blocks of a layer and ``per_layer_config`` gives the sizes of each layer.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "flapkit_"
SIZES = {"q": "H", "k": "K", "i": "I", "e": "E"}


class FlapkitConfig:
    """Mixin of a pruned model's configuration: dense sizes globally, pruned sizes in ``per_layer_config``.

    Of a vision-language model, the sizes are in ``text_config``, the configuration of its language model.
    """

    flapkit: Any = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a configuration; that of a pruned language model within it gets such a class, too."""
        text: Any = config_dict.get("text_config")
        if isinstance(text, dict) and "per_layer_config" in text:
            values = {key: value for key, value in text.items() if key != "model_type"}
            config_dict = {**config_dict, "text_config": text_class(text["model_type"]).from_dict(values)}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def validate_architecture(self) -> None:
        """Skip the check that the number of heads divides the hidden size: in a pruned layer it need not."""

    def validate_rope(self) -> None:
        """Skip the check of the rotary embedding, which assumes one number of heads for all layers."""


@cache
def text_class(model_type: str) -> Any:
    """Make the class of the configuration of a pruned language model within a vision-language model."""
    from huggingface_hub.dataclasses import strict
    from transformers import CONFIG_MAPPING

    dense = model_type.removeprefix(PREFIX)
    stock = CONFIG_MAPPING[dense]
    members = {"model_type": f"{PREFIX}{dense}", "__module__": __name__}
    return strict(type(f"Flapkit{stock.__name__}", (FlapkitConfig, stock), members))


class Resized:
    """Mixin of a stock model: build it dense, then resize its layers to the configuration's sizes."""

    # No annotations: they would be strings in this module, and vLLM checks arguments against them.
    def __init__(self, config, *args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN003, ANN204
        model: Any = self
        text = config.get_text_config()
        layers, blocks = text.to_dict().get("per_layer_config"), config.flapkit["blocks"]
        # Build the dense model with these very objects: its modules keep references to them. Some classes let an Auto
        # class build their decoder, which goes by the class of the configuration.
        parts = [(part, type(part)) for part in ([config] if text is config else [config, text])]
        text.per_layer_config = None
        for part, pruned in parts:
            part.__class__ = stock_of(pruned)
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
            dense = [heads_of(text, block) for block in blocks]
        finally:
            for part, pruned in parts:
                part.__class__ = pruned
            text.per_layer_config = layers
        for layer, shape in zip(model.get_submodule(layers_in(self)), text.per_layer_config, strict=True):
            for block, heads in zip(blocks, dense, strict=True):
                resize_(layer, block, heads, shape)
        pin_rotary_heads_(self)
        share_cache_(self)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Answer for the stock class, which is in the module that has the attention; vLLM asks this."""
        stock: Any = cls.__mro__[cls.__mro__.index(Resized) + 1]
        return bool(stock._can_set_attn_implementation())


def stock_of(pruned: type) -> type:
    """Return the class of transformers' that a configuration's class is derived from."""
    # By name: the processes of vLLM's server send each other copies of the class.
    names = [of.__name__ for of in pruned.__mro__]
    return pruned.__mro__[names.index(FlapkitConfig.__name__) + 1]


def pin_rotary_heads_(model: Any) -> None:
    """Make rotary embeddings read the dense model's number of heads, from which they compute the size of a head."""
    config = model.config.get_text_config()
    values, names = config.to_dict(), {block["heads"] for block in model.config.flapkit["blocks"]}
    heads = {name: values[key] for name in names if (key := config.attribute_map.get(name, name)) in values}
    for module in model.modules():
        current = getattr(module, "config", None)
        # Not those of a vision tower.
        is_text = config is model.config or getattr(current, "of", current) is config
        if "RotaryEmbedding" in type(module).__name__ and current is not None and is_text:
            module.config = ConfigView(config, heads)


def heads_of(config: Any, block: Any) -> dict[str, int]:
    """Read an attention's numbers of heads from the configuration; the width of an MLP is read from its tensors."""
    if block["kind"] != "attention":
        return {}
    heads, name = getattr(config, block["heads"]), block["kv_heads"]
    return {"H": heads, "K": name if isinstance(name, int) else getattr(config, name, None) or heads}


def find_module(layer: Any, block: Any) -> Any:
    """Return a block's module, or None if this layer has no such block."""
    try:
        module = layer.get_submodule(block["path"])
        module.get_parameter(columns_of(module, block)[0])
    except AttributeError:
        return None
    return module


def resize_(layer: Any, block: Any, dense: dict[str, int], shape: Any) -> None:
    """Resize the tensors of a newly built layer's block to a layer's sizes; nothing is done to one without it."""
    module = find_module(layer, block)
    if module is None:
        return
    consumer, dim = columns_of(module, block)
    channels = kept = module.get_parameter(consumer).shape[dim]
    if block["kind"] == "attention":
        sizes = {"H": shape.num_attention_heads, "K": shape.num_key_value_heads}
        kept = channels // dense["H"] * sizes["H"]
    else:
        letter, kept = "E" if block["kind"] == "mixture" else "I", getattr(shape, block["width"])
        dense, sizes = {letter: channels}, {letter: kept}
    if getattr(shape, f"{block['name']}_out_bias", False):
        add_bias_(module, block)
    if not kept:
        remove_(layer, block)
        return
    narrow_(module, consumer, dim, kept, channels)
    for name, layout in block["parameters"].items():
        for parameter, rows in rows_of(module, block, name):
            narrow_(module, parameter, rows, count_rows(layout, sizes), count_rows(layout, dense))
    counts, reads = (getattr(shape, f"{block['name']}_{what}", None) for what in ("counts", "reads"))
    heads = getattr(shape, "kept_heads", None) if block["arguments"] or block["outputs"] else None
    set_sizes_(module, block, counts, reads, dense, heads)


class Removed(nn.Module):
    """What is left of a block without units: the bias of its consumer, under its name."""

    def __init__(self, stock: Any, consumer: str, *, attends: bool) -> None:
        super().__init__()
        self.attends = attends
        self.path = consumer
        self.arguments = list(signature(stock.forward).parameters)
        owner: Any = self
        for part in consumer.split(".") if consumer else ():
            owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter("bias", stock.get_submodule(consumer).bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the stock block would: zeros plus the bias, and the residual where the block itself adds it."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        output = torch.zeros_like(given[self.arguments[0]])
        owner: Any = self.get_submodule(self.path)
        for added in (owner.bias, given.get("residual")):
            if added is not None:
                output = output + added.to(output.dtype)
        return (output, None) if self.attends else output


def remove_(layer: Any, block: Any) -> None:
    """Remove a block from a layer, all but the bias of its consumer."""
    path, consumer = block["path"], block["consumer"]
    if path:
        layer.set_submodule(path, Removed(layer.get_submodule(path), consumer, attends=block["kind"] == "attention"))
        return
    # The layer's own forward calls the block's linears.
    for name in block["parameters"]:
        layer.set_submodule(name.removesuffix("?"), nn.Identity())
    layer.set_submodule(consumer, Removed(layer.get_submodule(consumer), "", attends=False))


def share_cache_(model: Any) -> None:
    """Give the first places of the KV cache to the layers that have an attention, in order, as far as any has none.

    The first place counts the tokens of the text so far, and the first one of a type of layers (sliding windows) those
    of its mask. Places that no layer uses are declared as shared with others, so that caches hold nothing there.
    """
    config = model.config.get_text_config()
    places: dict[Any, list[int]] = {}
    owners: dict[Any, list[Any]] = {}
    types = getattr(config, "layer_types", None)
    modes: list[Any] = [None] * config.num_hidden_layers
    for block in model.config.flapkit["blocks"]:
        if block["kind"] != "attention":
            continue
        for index, layer in enumerate(model.get_submodule(layers_in(model))):
            module = find_module(layer, block)
            if module is None and not removed_from(layer, block):
                continue
            of = types[index] if types else None
            places.setdefault(of, []).append(index)
            owners.setdefault(of, []).extend([] if module is None else [module])
    for of, indices in places.items():
        for index, module in zip(indices, owners[of], strict=False):
            setattr(module, "layer_idx" if hasattr(module, "layer_idx") else "layer_id", index)
        for index in indices[len(owners[of]) :]:
            modes[index] = "reuse"
    if any(modes):
        config.kv_sharing_modes = modes


def narrow_(module: Any, name: str, dim: int, part: int, whole: int) -> None:
    """Keep the first ``part`` of ``whole`` equal parts of a dimension, with the stock model's initial values."""
    old = tensor_of(module, name).detach()
    replace_(module, name, old.narrow(dim, 0, old.shape[dim] * part // whole).clone())


def layers_in(model: Any) -> str:
    """Return the path of the list of layers in a model, which may be a decoder without its head."""
    path: str = model.config.flapkit["layers"]
    prefix = f"{model.base_model_prefix}."
    return path if model.base_model is not model else path.removeprefix(prefix)


def removed_from(layer: Any, block: Any) -> bool:
    """Tell whether a block was removed from a layer; a mixture always keeps experts."""
    if block["kind"] == "mixture":
        return False
    try:
        module = layer.get_submodule(block["path"] or block["consumer"])
    except AttributeError:
        return False
    # Layers of a hybrid have an attention or an MLP at the same path.
    return isinstance(module, Removed) and module.path == (block["consumer"] if block["path"] else "")


def columns_of(module: Any, block: Any) -> tuple[str, int]:
    """Return the name of the consumer's weight, and the dimension of its input channels, or of a mixture's experts."""
    name = block["consumer"]
    if block["kind"] == "mixture":
        return name, 0
    if block["kind"] == "experts":
        return name, 1 if module.is_transposed else 2
    return f"{name}.weight", 0 if is_conv1d(module.get_submodule(name)) else 1


def rows_of(module: Any, block: Any, name: str) -> list[tuple[str, int]]:
    """Return the parameters of a coupled name, each with the dimension of its rows: weight and bias of a module."""
    path, optional = name.removesuffix("?"), name.endswith("?")
    owner, _, leaf = path.rpartition(".")
    target = getattr(module.get_submodule(owner), leaf, None)
    if target is None and optional:
        return []
    if isinstance(target, Tensor):
        stacked = block["kind"] == "experts"
        return [(path, 2 if stacked and target.dim() == 3 and module.is_transposed else int(stacked))]
    transposed, bias = is_conv1d(target), getattr(target, "bias", None)
    return [(f"{path}.weight", int(transposed)), *([(f"{path}.bias", 0)] if bias is not None else [])]


def count_rows(layout: str, sizes: dict[str, int]) -> int:
    """Count the rows of a layout such as ``q+k+k``, in heads or in channels."""
    return sum(sizes[SIZES[part]] for part in layout.strip("()").split("+"))


def is_conv1d(module: Any) -> bool:
    """Tell whether a module is GPT-2's linear, whose weight is transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def is_linear(module: Any) -> bool:
    """Tell whether a module is a linear of torch's or GPT-2's."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def tensor_of(module: Any, name: str) -> Any:
    """Return a parameter or a buffer by its full name."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def replace_(module: Any, name: str, value: Tensor) -> None:
    """Replace a parameter or a buffer by a tensor, and update the size attributes of a linear."""
    path, _, leaf = name.rpartition(".")
    owner, old = module.get_submodule(path), tensor_of(module, name)
    value = value.contiguous()
    setattr(
        owner, leaf, nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    )
    if leaf == "weight" and isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = value.shape
    elif leaf == "weight" and is_conv1d(owner):
        owner.nx, owner.nf = value.shape


def add_bias_(module: Any, block: Any) -> None:
    """Give a consumer a bias of zeros if it has none; the biases of experts are weighted by the router."""
    name, dim = columns_of(module, block)
    weight = module.get_parameter(name)
    zeros = nn.Parameter(weight.data.select(dim, 0).clone().zero_(), requires_grad=weight.requires_grad)
    if block["kind"] != "experts":
        owner = module.get_submodule(block["consumer"])
        owner.bias = zeros if owner.bias is None else owner.bias
    elif getattr(module, f"{name}_bias", None) is None:
        setattr(module, f"{name}_bias", zeros)
        module.register_forward_hook(ExpertBias(f"{name}_bias"), with_kwargs=True)


def set_sizes_(
    module: Any, block: Any, counts: Any, reads: Any, dense: dict[str, int], heads: list[int] | None
) -> None:
    """Update all but the tensors: size attributes, configuration entries that forward reads, and kept query heads."""
    for name, value in (counts or {}).items():
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, value)
    if reads:
        module.config = ConfigView(getattr(module.config, "of", module.config), reads)
    if heads is not None:
        keep_heads_(module, block, dense, heads)


class ConfigView:
    """The model's configuration with some entries of one layer replaced; unlike a copy, it follows later changes."""

    def __init__(self, of: Any, values: dict[str, Any]) -> None:
        self.__dict__.update(values, of=of)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = getattr(type(self.of), name, None)
        return member.fget(self) if isinstance(member, property) and member.fget else getattr(self.of, name)


class ExpertBias:
    """Forward hook: add the experts' output biases, weighted by the router, whichever kernel computes the experts."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Run after ``forward(hidden_states, top_k_index, top_k_weights)`` of an experts module."""
        _, index, weights = (*args, *kwargs.values())
        bias = module.get_parameter(self.name)
        routed = weights.new_zeros(len(index), len(bias)).scatter_add(1, index, weights)
        return output + (routed.to(bias.dtype) @ bias).to(output.dtype)


def keep_heads_(module: Any, block: Any, dense: dict[str, int], heads: list[int]) -> None:
    """Set the dense model's query heads that a block keeps; hooks of an earlier pruning are reused."""
    first, module.kept_heads = not hasattr(module, "kept_heads"), heads
    module.dense_heads = dense = dense if first else module.dense_heads
    names = list(signature(module.forward).parameters)
    for name, dim in block["arguments"].items() if first else ():
        module.register_forward_pre_hook(KeptArgument(dense["H"], name, dim, names.index(name)), with_kwargs=True)
    index = {"q": heads, "k": sorted({head * dense["K"] // dense["H"] for head in heads})}
    for name, part in block["outputs"].items():
        owner = module.get_submodule(name)
        owner.kept_heads, owner.dense_heads = index[part], dense[SIZES[part]]
        if first:
            stock: Any = type(owner)
            owner.__class__ = kept_output_class(stock)


class KeptArgument:
    """Forward pre-hook: select the kept heads of an argument with dimension ``dim`` of heads, or batch times heads."""

    def __init__(self, total: int, name: str, dim: int, position: int) -> None:
        self.total, self.name, self.dim, self.position = total, name, dim, position

    def __call__(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Run before the module's forward."""
        if self.name in kwargs:
            return args, {**kwargs, self.name: self.pick(kwargs[self.name], module.kept_heads)}
        return tuple(self.pick(x, module.kept_heads) if i == self.position else x for i, x in enumerate(args)), kwargs

    def pick(self, tensor: Any, heads: list[int]) -> Any:
        """Select the heads of a tensor; return anything else, and tensors shared by all heads, unchanged."""
        if not isinstance(tensor, Tensor) or tensor.shape[self.dim] % self.total:
            return tensor
        parts = tensor.unflatten(self.dim, (-1, self.total))
        return parts.index_select(self.dim + 1, torch.tensor(heads, device=tensor.device)).flatten(
            self.dim, self.dim + 1
        )


class KeptOutput:
    """Mixin of a module whose output [..., heads * features] has all heads of the dense model: select the kept ones.

    A class and not a hook: vLLM replaces the norms that it knows, and would drop their hooks.
    """

    def forward(self, x: Any) -> Any:
        """Run the stock module, and select heads of its output."""
        module: Any = self
        output = super().forward(x)  # type: ignore[misc]
        index = torch.tensor(module.kept_heads, device=output.device)
        return output.unflatten(-1, (module.dense_heads, -1)).index_select(-2, index).flatten(-2)


@cache
def kept_output_class(stock: type) -> type:
    """Derive a module's class that selects heads of its output."""
    return type(f"{stock.__name__}OfKeptHeads", (KeptOutput, stock), {})
