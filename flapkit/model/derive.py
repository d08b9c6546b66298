"""``adapter: auto``: derive the declaration of an undeclared model from a tiny random model of its class.

A derived declaration is verified (``flapkit.model.verify``) on tiny models before use, and once more on the model
itself after loading.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import yaml
from torch import Tensor, nn

from flapkit.model.adapter import FamilyAdapter
from flapkit.model.declaration import Block, Family, declaration_of, with_experts
from flapkit.model.empty import ConfigKey, check_causal, sees, skeleton
from flapkit.model.gradient_probe import Layer
from flapkit.model.layout import sites_of
from flapkit.model.resize import find_module, heads_of, is_linear
from flapkit.model.site import Site
from flapkit.model.tiny import doubled, tiny_config, tiny_model
from flapkit.model.verify import BROKEN, verify, verify_loaded, verify_without_blocks
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SIZES = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_head": 32,
}
"""Sizes of the tiny model; they differ, so that a module's size attributes can be told apart."""

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Configuration entries for the number of experts."""

log = logging.getLogger(__name__)

BATCH = 3
"""Batch size for finding arguments with a dimension of heads; no other size is a multiple of it."""


@dataclass(frozen=True)
class Auto(FamilyAdapter):
    """Use the declaration of the model type if a plugin has one; else derive it from a tiny model, and verify it."""

    name = "auto"
    family: ClassVar[Family] = Family("auto", (), "", ())

    @property
    def title(self) -> str:
        """The adapter's name, with the origin of the declaration."""
        return "auto (derived and verified)"

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Return False: declared models use their own adapters."""
        return False

    def family_of(self, config: PreTrainedConfig) -> Family:
        """Derive the declaration, or read it from the configuration of a pruned model."""
        return declaration_of(config) if getattr(config, "flapkit", None) else derive(config)

    def check_declaration(self, config: PreTrainedConfig) -> None:
        """Do nothing: a derived declaration is verified already."""

    def confirm(self, model: PreTrainedModel, sites: Sequence[Site]) -> None:
        """Verify one layer of each block of the loaded model on a few tokens."""
        verify_loaded(model, sites)


def derive(config: PreTrainedConfig) -> Family:
    """Derive and verify the declaration of a model's class; the result is cached.

    Raises:
        ModelError: the model is not a decoder-only transformer, or the derived declaration fails verification.
    """
    check_causal(config)
    if sees(config):
        raise ModelError(
            f"models of type {config.model_type!r} are vision-language models: `adapter: auto` derives no declarations "
            "of their language models; docs/families.md lists those that are declared, and docs/architectures.md says "
            "how to declare one"
        )
    return _derive(ConfigKey.make(config))


@lru_cache(maxsize=8)
def _derive(key: ConfigKey) -> Family:
    config, family = key.config(), None
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            family = propose(tiny_of(config, attention="eager"))
            _check_attends(config, family)
            for changes in _variants(config):
                model = tiny_of(config, **changes)
                verify(model, sites_of(model, with_experts(family, "channel")))
                family = _with_sound_mixture(model, family)
            family = _with_removable(config, family)
    except BROKEN as error:
        raise _refusal(config, f"the tiny model fails: {type(error).__name__}: {error}", family) from error
    except ModelError as error:
        raise _refusal(config, str(error), family) from error
    return family


def _with_sound_mixture(model: PreTrainedModel, family: Family) -> Family:
    """Return a declaration without its mixture, unless whole experts can be removed."""
    if all(block.kind != "mixture" for block in family.blocks):
        return family
    try:
        verify(model, sites_of(model, with_experts(family, "expert")))
    except (ModelError, *BROKEN) as error:
        log.debug("%s: whole experts cannot be removed: %s", family.name, error)
        return with_experts(family, "channel")
    return family


def _with_removable(config: PreTrainedConfig, family: Family) -> Family:
    """Declare for each block whether it can go altogether: whether the model computes the same without it as masked."""
    try:
        model = tiny_of(config)
        model = tiny_model(doubled(model.config))
    except (ModelError, *BROKEN):
        return replace(family, blocks=tuple(replace(block, removable=False) for block in family.blocks))
    blocks = []
    for block in family.blocks:
        if block.kind == "mixture":
            blocks.append(block)
            continue
        alone = replace(family, blocks=tuple(replace(b, removable=b is block) for b in family.blocks))
        try:
            verify_without_blocks(model, sites_of(model, with_experts(alone, "channel")))
            blocks.append(block)
        except (ModelError, *BROKEN) as error:
            log.debug("%s stays: %s", block.name, error)
            blocks.append(replace(block, removable=False))
    return replace(family, blocks=tuple(blocks))


def _refusal(config: PreTrainedConfig, reason: str, family: Family | None) -> ModelError:
    text = f"no plugin declares models of type {config.model_type!r}, and `adapter: auto` cannot prune them: {reason}"
    if family is None or not family.blocks:
        return ModelError(f"{text}; see docs/auto.md for what can be derived, and how to write a declaration")
    advice = "Derived so far; correct it, save it, and list the file in the recipe's `plugins`:"
    return ModelError(f"{text}\n{advice}\n\n{as_yaml(family)}")


def as_yaml(family: Family) -> str:
    """Write a declaration as YAML for a recipe's ``plugins``, without default values."""
    blocks = []
    for block in family.blocks:
        defaults = {field.name: field.default for field in dataclasses.fields(Block)} | {"name": block.kind}
        values = {
            key: value for key, value in block.data.items() if value != defaults[key] and (value or value is False)
        }
        blocks.append({**values, "path": block.path})
    data = {"name": family.name, "model_types": list(family.model_types), "layers": family.layers, "blocks": blocks}
    text: str = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=110)
    return text


def tiny_of(config: PreTrainedConfig, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """Build the tiny random model from which a configuration's declaration is derived."""
    values = config.to_dict()
    sizes = {key: value for key, value in SIZES.items() if values.get(config.attribute_map.get(key, key)) is not None}
    if values.get("kv_lora_rank"):
        # Latent attention has a key and a value for each query head.
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return tiny_model(tiny_config(config, **{**sizes, **changes}), attention=attention)


def _variants(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """List the variants to verify: with grouped-query attention, and with the model's own kind of heads."""
    yield {}
    kv_heads, heads = (getattr(config, name, None) for name in ("num_key_value_heads", "num_attention_heads"))
    if kv_heads is not None and kv_heads in (1, heads) and not getattr(config, "kv_lora_rank", None):
        yield {"num_key_value_heads": 1 if kv_heads == 1 else SIZES["num_attention_heads"]}


def propose(model: PreTrainedModel) -> Family:
    """Derive a declaration from a tiny model, without verifying it.

    Raises:
        ModelError: the model has no list of decoder layers.
    """
    model_type = model.config.model_type
    path = _layers(model)
    layers: Any = model.get_submodule(path)
    merged: dict[tuple[str, str, str], Block] = {}
    for index, module in enumerate(layers):
        layer = Layer(model, path, index, hasattr(model.config, "num_attention_heads"))
        candidates = [block for consumer in layer.consumers() if (block := layer.block(consumer))]
        linear = [block for block in map(_with_common_path, candidates) if not _convolves(module, block)]
        for block in [*linear, *_experts(module), *_mixtures(module, model.config)]:
            key = (block.kind, block.path, block.consumer)
            merged[key] = _merge(merged[key], block) if key in merged else block
    blocks = [_complete_attention(model, path, block) for block in _with_names(merged.values())]
    return Family(f"my_{model_type}", (model_type,), path, tuple(blocks))


def _check_attends(config: PreTrainedConfig, family: Family) -> None:
    """Raise ``ModelError`` unless the declaration has an attention block."""
    kinds = [block.kind for block in family.blocks]
    if "attention" in kinds:
        return
    if not any("attention" in type(module).__name__.lower() for module in skeleton(config).modules()):
        raise ModelError("the model has no attention layers")
    raise ModelError(
        "no parameter matches the attention heads in a layout that flapkit knows; derived blocks: "
        + (", ".join(kinds) or "none")
    )


def _layers(model: PreTrainedModel) -> str:
    """Return the full name of the list of decoder layers: the first list of the right length."""
    decoder = model.get_decoder()
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    count = model.config.num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return names[id(module)]
    raise ModelError(f"{type(decoder).__name__} has no list of {count} layers")


def _convolves(layer: nn.Module, block: Block) -> bool:
    """Return whether a block mixes tokens by a convolution, as state-space blocks do: such a block stays whole."""
    return bool(block.path) and any(isinstance(part, nn.Conv1d) for part in layer.get_submodule(block.path).modules())


def _with_common_path(block: Block) -> Block:
    """Set a block's path to the innermost module that contains its consumer and parameters."""
    owners = [name.rpartition(".")[0].split(".") for name in (block.consumer, *block.parameters)]
    shared = []
    for parts in zip(*owners, strict=False):
        if len(set(parts)) > 1 or not parts[0]:
            break
        shared.append(parts[0])
    start = len(".".join(shared)) + bool(shared)
    parameters = {name[start:]: layout for name, layout in block.parameters.items()}
    return replace(block, path=".".join(shared), consumer=block.consumer[start:], parameters=parameters)


def _experts(layer: nn.Module) -> Iterator[Block]:
    """Yield the blocks of stacked experts; transformers' experts modules carry flags for their layout."""
    for path, module in layer.named_modules():
        if hasattr(module, "is_transposed") and hasattr(module, "down_proj"):
            fused = "i+i" if getattr(module, "is_concatenated", True) else "(i+i)"
            names = {"gate_up_proj": fused, "up_proj": "i", "gate_proj": "i"}
            names |= {f"{name}_bias": layout for name, layout in names.items()}
            parameters = {name: layout for name, layout in names.items() if getattr(module, name, None) is not None}
            yield Block("experts", path, "down_proj", parameters, width="moe_intermediate_size")


def _mixtures(layer: nn.Module, config: PreTrainedConfig) -> Iterator[Block]:
    """Yield the blocks of whole experts: beside stacked experts lies their router, which chooses ``top_k`` of them."""
    values = config.to_dict()
    for experts in _experts(layer):
        path, _, inner = experts.path.rpartition(".")
        owner: Any = layer.get_submodule(path)
        stack = getattr(owner, inner).get_parameter(experts.consumer)
        width = next((name for name in EXPERT_COUNTS if values.get(name) == len(stack)), None)
        for name, router in owner.named_children():
            weight = getattr(router, "weight", None)
            if not hasattr(router, "top_k") or weight is None or len(weight) != len(stack) or width is None:
                continue
            vectors = [part for part, _ in (*router.named_parameters(), *router.named_buffers()) if part != "weight"]
            parameters = [f"{inner}.{part}" for part, _ in getattr(owner, inner).named_parameters()]
            parameters = [part for part in parameters if part != f"{inner}.{experts.consumer}"]
            if f"{inner}.{experts.consumer}_bias" not in parameters:
                # A compensator adds one.
                parameters.append(f"{inner}.{experts.consumer}_bias?")
            parameters += [name, *(f"{name}.{part}" for part in vectors if part != "bias")]
            counts = [part for part in (inner, name) if hasattr(getattr(owner, part), "num_experts")]
            yield Block(
                "mixture",
                path,
                f"{inner}.{experts.consumer}",
                dict.fromkeys(parameters, "e"),
                attributes={f"{part}.num_experts": "E" for part in counts},
                width=width,
                router=name,
            )


def _merge(one: Block, other: Block) -> Block:
    """Merge the declarations of a block from two layers: a parameter of only one of them is optional."""
    both = {name.removesuffix("?"): layout for block in (one, other) for name, layout in block.parameters.items()}
    common = one.parameters.keys() & other.parameters.keys()
    return replace(one, parameters={name if name in common else f"{name}?": layout for name, layout in both.items()})


def _with_names(blocks: Any) -> Iterator[Block]:
    """Give every block a unique name, and every MLP a unique configuration entry for its width."""
    taken: set[str] = set()
    for block in blocks:
        name = block.kind if block.kind not in taken else block.path.replace(".", "_")
        width = f"{name}_size" if block.kind == "mlp" and taken & {"mlp"} else block.width
        taken.add(name)
        yield replace(block, name=name, width=width)


def _complete_attention(model: PreTrainedModel, path: str, block: Block) -> Block:
    """Add to an attention block what depends on its heads beside tensors: attributes, reads, arguments and outputs."""
    if block.kind != "attention":
        return block
    layers: Any = model.get_submodule(path)
    module = next(module for layer in layers if (module := find_module(layer, block.data)) is not None)
    sizes = heads_of(model.config, block.data)
    consumer = module.get_submodule(block.consumer)
    sizes["D"] = (consumer.in_features if isinstance(consumer, nn.Linear) else consumer.nx) // sizes["H"]
    norms = _whole_norms(module, block)
    return replace(
        block,
        parameters={name: layout for name, layout in block.parameters.items() if name not in norms},
        outputs=norms,
        attributes=dict(_attributes(module, sizes)),
        reads=_reads(module, model.config),
        arguments=_arguments(model, module, sizes["H"]),
    )


def _whole_norms(module: nn.Module, block: Block) -> dict[str, Any]:
    """List norms over a whole projection: their weights go with a unit, but the projection's rows do not."""
    linears = [layout for name, layout in block.parameters.items() if is_linear(_part(module, name))]
    vectors = {
        name: layout
        for name, layout in block.parameters.items()
        if isinstance(part := _part(module, name), nn.Module) and part.get_parameter("weight").dim() == 1
    }
    return vectors if "q" in vectors.values() and not any("q" in layout for layout in linears) else {}


def _part(module: nn.Module, name: str) -> Any:
    owner, _, leaf = name.removesuffix("?").rpartition(".")
    return getattr(module.get_submodule(owner), leaf, None)


def _attributes(module: nn.Module, sizes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield the module's size attributes: of groups, and of heads if a method other than the constructor reads them."""
    read = _names_read(module)
    for name, value in vars(module).items():
        if type(value) is not int:
            continue
        if "group" in name or "n_rep" in name:
            if value == sizes["H"] // sizes["K"]:
                yield name, "H//K"
        elif name not in read:
            continue
        elif "head" in name and "dim" not in name and "size" not in name:
            if value in (sizes["K"], sizes["H"]):
                yield name, "K" if value == sizes["K"] != sizes["H"] else "H"
        elif value == sizes["H"] * sizes["D"]:
            yield name, "H*D"


def _names_read(module: nn.Module) -> set[str]:
    """Return the names that the module's methods read, without its constructor."""
    methods = [inspect.unwrap(member) for member in vars(type(module)).values() if inspect.isfunction(member)]
    return {name for method in methods if method.__name__ != "__init__" for name in method.__code__.co_names}


def _reads(module: nn.Module, config: PreTrainedConfig) -> dict[str, str]:
    """Return the numbers of heads that the module's forward reads from the configuration."""
    import transformers

    if not isinstance(getattr(module, "config", None), transformers.PreTrainedConfig):
        return {}
    counts = {"num_attention_heads": "H", "num_key_value_heads": "K"}
    read = _names_read(module) - set(vars(module))
    return {name: count for name, count in counts.items() if name in read and hasattr(config, name)}


@torch.no_grad()
def _arguments(model: PreTrainedModel, module: nn.Module, heads: int) -> dict[str, int]:
    """Find the arguments of a module's forward with a dimension of heads, or of batch times heads."""
    head_dims: dict[str, int] = {}

    def inspect_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        for name, value in {**bound, **bound.get("kwargs", {})}.items():
            if isinstance(value, Tensor) and value.dim() > 2:
                dims = [dim for dim, size in enumerate(value.shape[:2]) if size in (heads, BATCH * heads)]
                head_dims.update({name: dims[0]} if dims else {})

    hook = module.register_forward_pre_hook(inspect_arguments, with_kwargs=True)
    try:
        model(input_ids=torch.full((BATCH, 11), 2), use_cache=False)
    finally:
        hook.remove()
    return head_dims
