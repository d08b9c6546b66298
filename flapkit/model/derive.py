"""`adapter: auto`: the declaration of a model that nobody declared, derived from a tiny random one of its class.

A derived declaration is used only after the law of ``flapkit.model.verify`` holds on tiny models, and once more on the
model itself when it is loaded.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flapkit.model.adapter import FamilyAdapter
from flapkit.model.declaration import Block, Family, declaration_of
from flapkit.model.empty import check_causal, config_of, skeleton
from flapkit.model.gradient_probe import Layer
from flapkit.model.layout import sites_of
from flapkit.model.resize import find, heads_of
from flapkit.model.site import Site
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.model.verify import verify, verify_loaded
from flapkit.system.errors import ModelError

SIZES = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
"""Sizes of the tiny model: every count that a module may keep is another number."""

BATCH = 3
"""Sequences that show which arguments of forward count heads: no other size is a multiple of so many."""


@dataclass(frozen=True)
class Auto(FamilyAdapter):
    """By model type where a plugin declares it; else derived from a tiny model of the class, and proven before use."""

    name = "auto"
    family: ClassVar[Family] = Family("auto", (), "", ())

    @property
    def title(self) -> str:
        """Say where the declaration comes from."""
        return "auto (derived and proven)"

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Leave every declared model to its declaration."""
        return False

    def family_of(self, config: PreTrainedConfig) -> Family:
        """Derive the declaration, or read it where the model is pruned already."""
        return declaration_of(config) if getattr(config, "flapkit", None) else derive(config)

    def confirm(self, model: PreTrainedModel, sites: Sequence[Site]) -> None:
        """Compare one layer's blocks of the loaded model, sliced and masked, on a few tokens."""
        verify_loaded(model, sites)


def derive(config: PreTrainedConfig) -> Family:
    """Derive the declaration of a model's class and prove it; the same one is derived once.

    Raises:
        ModelError: the model is no decoder-only transformer, or what was derived does not hold.
    """
    check_causal(config)
    of: Any = type(config)
    return _derive(of, json.dumps(config.to_dict(), default=str, sort_keys=True))


@lru_cache(maxsize=8)
def _derive(of: Any, text: str) -> Family:
    config = config_of(of, json.loads(text))
    family = None
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            family = propose(tiny_of(config, attention="eager"))
            _check_attends(config, family)
            for changes in _forms(config):
                model = tiny_of(config, **changes)
                verify(model, sites_of(model, family))
    except (RuntimeError, ValueError, IndexError, AttributeError, TypeError, KeyError) as error:
        raise _refusal(config, f"a tiny model cannot be examined: {type(error).__name__}: {error}", family) from error
    except ModelError as error:
        raise _refusal(config, str(error), family) from error
    return family


def _refusal(config: PreTrainedConfig, reason: str, family: Family | None) -> ModelError:
    said = f"models of type {config.model_type!r} are declared by no plugin, and `adapter: auto` cannot prune them: "
    said += reason
    if family is None or not family.blocks:
        return ModelError(f"{said}; docs/auto.md says what can be derived, and how to declare the rest")
    return ModelError(
        f"{said}\nThis was derived; correct it, and name the file in the recipe's `plugins`:\n\n{as_yaml(family)}"
    )


def as_yaml(family: Family) -> str:
    """Write a declaration as the file that a recipe's ``plugins`` can name, less what is the default anyway."""
    blocks = []
    for block in family.blocks:
        defaults = {each.name: each.default for each in dataclasses.fields(Block)} | {"name": block.kind}
        said = {key: value for key, value in block.data.items() if value and value != defaults[key]}
        blocks.append({**said, "path": block.path})
    data = {"name": family.name, "model_types": list(family.model_types), "layers": family.layers, "blocks": blocks}
    text: str = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=110)
    return text


def tiny_of(config: PreTrainedConfig, attention: str | None = None, **changes: Any) -> PreTrainedModel:
    """Build the tiny random model of a configuration's class and options that its declaration is derived from."""
    values = config.to_dict()
    sizes = {key: value for key, value in SIZES.items() if values.get(config.attribute_map.get(key, key)) is not None}
    if values.get("kv_lora_rank"):
        # Latent attention has a key and a value for each query head.
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    return tiny_model(tiny_config(config, **{**sizes, **changes}), attention=attention)


def _forms(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """List the forms to prove: with grouped heads, and as the model itself has them."""
    yield {}
    kv_heads, heads = (getattr(config, name, None) for name in ("num_key_value_heads", "num_attention_heads"))
    if kv_heads is not None and kv_heads in (1, heads) and not getattr(config, "kv_lora_rank", None):
        yield {"num_key_value_heads": 1 if kv_heads == 1 else SIZES["num_attention_heads"]}


def propose(model: PreTrainedModel) -> Family:
    """Derive a declaration from a tiny model; nothing is proven yet.

    Raises:
        ModelError: there are no decoder layers.
    """
    model_type = model.config.model_type
    path = _layers(model)
    layers: Any = model.get_submodule(path)
    found: dict[tuple[str, str, str], Block] = {}
    for index, module in enumerate(layers):
        layer = Layer(model, path, index, hasattr(model.config, "num_attention_heads"))
        blocks = [block for consumer in layer.consumers() if (block := layer.block(consumer))]
        for block in [*map(_rooted, blocks), *_experts(module)]:
            key = (block.kind, block.path, block.consumer)
            found[key] = _joined(found[key], block) if key in found else block
    settled = [_settled(model, path, block) for block in _named(found.values())]
    return Family(f"my_{model_type}", (model_type,), path, tuple(settled))


def _check_attends(config: PreTrainedConfig, family: Family) -> None:
    """Raise ``ModelError`` unless an attention was found."""
    kinds = [block.kind for block in family.blocks]
    if "attention" in kinds:
        return
    if not any("attention" in type(module).__name__.lower() for module in skeleton(config).modules()):
        raise ModelError("this is no transformer: no layer attends")
    raise ModelError(
        "nothing goes with the heads of its attention, alone and in a layout that flapkit knows; found: "
        + (", ".join(kinds) or "no block")
    )


def _layers(model: PreTrainedModel) -> str:
    """Return the full name of the decoder's first list of modules that has as many as there are layers."""
    decoder = model.get_decoder()
    names: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    count = model.config.num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return names[id(module)]
    raise ModelError(f"its {type(decoder).__name__} has no list of {count} layers")


def _rooted(block: Block) -> Block:
    """Move a block's path down to the module that holds everything it names, and settle what norms do."""
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
    """List the modules that stack the parameters of all experts: transformers' experts say how they are laid out."""
    for path, module in layer.named_modules():
        if hasattr(module, "is_transposed") and hasattr(module, "down_proj"):
            fused = "i+i" if getattr(module, "is_concatenated", True) else "(i+i)"
            names = {"gate_up_proj": fused, "up_proj": "i", "gate_proj": "i"}
            names |= {f"{name}_bias": layout for name, layout in names.items()}
            parameters = {name: layout for name, layout in names.items() if getattr(module, name, None) is not None}
            yield Block("experts", path, "down_proj", parameters, width="moe_intermediate_size")


def _joined(one: Block, other: Block) -> Block:
    """Put two layers' findings about a block together: what only one has, may be absent."""
    both = {name.removesuffix("?"): layout for each in (one, other) for name, layout in each.parameters.items()}
    certain = one.parameters.keys() & other.parameters.keys()
    return replace(one, parameters={name if name in certain else f"{name}?": layout for name, layout in both.items()})


def _named(blocks: Any) -> Iterator[Block]:
    """Give every block a name of its own, and every MLP a name for its width."""
    taken: set[str] = set()
    for block in blocks:
        name = block.kind if block.kind not in taken else block.path.replace(".", "_")
        width = f"{name}_size" if block.kind == "mlp" and taken & {"mlp"} else block.width
        taken.add(name)
        yield replace(block, name=name, width=width)


def _settled(model: PreTrainedModel, path: str, block: Block) -> Block:
    """Add what is no tensor and has to follow the cut of an attention: counts, readings, arguments, whole norms."""
    if block.kind != "attention":
        return block
    layers: Any = model.get_submodule(path)
    module = next(found for layer in layers if (found := find(layer, block.data)) is not None)
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
    """List norms over a whole projection: their weights die with a unit, the projection's rows do not."""
    linears = [
        layout for name, layout in block.parameters.items() if isinstance(_part(module, name), (nn.Linear, Conv1D))
    ]
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
    """List the counts that a module keeps: of groups, and those of heads that it reads outside its constructor."""
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
    """List the names that a module's methods, but for its constructor, read."""
    methods = [inspect.unwrap(each) for each in vars(type(module)).values() if inspect.isfunction(each)]
    return {name for each in methods if each.__name__ != "__init__" for name in each.__code__.co_names}


def _reads(module: nn.Module, config: PreTrainedConfig) -> dict[str, str]:
    """List the head counts that a module's forward reads from the configuration, and does not keep itself."""
    if not isinstance(getattr(module, "config", None), PreTrainedConfig):
        return {}
    counts = {"num_attention_heads": "H", "num_key_value_heads": "K"}
    read = _names_read(module) - set(vars(module))
    return {name: count for name, count in counts.items() if name in read and hasattr(config, name)}


@torch.no_grad()
def _arguments(model: PreTrainedModel, module: nn.Module, heads: int) -> dict[str, int]:
    """Find the arguments of a module's forward with a dimension of heads, or of batch times heads."""
    found: dict[str, int] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        for name, value in {**bound, **bound.get("kwargs", {})}.items():
            if isinstance(value, Tensor) and value.dim() > 2:
                dims = [dim for dim, size in enumerate(value.shape[:2]) if size in (heads, BATCH * heads)]
                found.update({name: dims[0]} if dims else {})

    hook = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model(input_ids=torch.full((BATCH, 11), 2), use_cache=False)
    finally:
        hook.remove()
    return found
