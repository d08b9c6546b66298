"""The transformers classes that load pruned models, derived from the stock classes of each model type.

transformers' own classes cannot be built from a configuration with layers of different sizes. A derived class builds
the stock model and resizes its layers. The classes of a model type are made on first use;
``flapkit.model.registration`` announces them to the Auto classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from torch import nn

from flapkit.model import resize
from flapkit.model.empty import config_of
from flapkit.model.registration import PREFIX
from flapkit.model.site import Site
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PRUNED_KEYS = ("per_layer_config", "flapkit", "kv_sharing_modes", "model_type", "auto_map", "architectures")
"""Configuration entries of a pruned checkpoint that a dense one lacks, or has with another value."""

HEAD_DIM = "head_dim"
"""The configuration's entry for the size of a head; a pruned model's always has it."""

CONFIG = '''

from huggingface_hub.dataclasses import strict
from {config_module} import {config}
from {model_module} import {stock}


@strict
class Flapkit{config}(FlapkitConfig, {config}):
    """The configuration of a pruned {dense}."""
    model_type = "{prefix}{dense}"
'''
"""Begins the end of a checkpoint's modeling file, after the source of ``resize.py``."""

CLASS = '''

class Flapkit{stock}(Resized, {stock}):
    """{stock} of a pruned model."""
    config_class = Flapkit{config}
'''
"""One of the classes of ``pruned_classes``."""

CAUSAL_LM = "AutoModelForCausalLM"

HEADS = (
    CAUSAL_LM,
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
"""The Auto classes of models that can be pruned."""


@dataclass(frozen=True, slots=True)
class PrunedClasses:
    """The classes of pruned models of one model type.

    Args:
        dense: model type of the dense model.
        config: configuration class of pruned models.
        backbone: class of the decoder without its head.
        heads: Auto class -> class of the decoder with that head.
    """

    dense: str
    config: type[PreTrainedConfig]
    backbone: type[PreTrainedModel]
    heads: Mapping[str, type[PreTrainedModel]]

    def head_of(self, model: nn.Module) -> str | None:
        """Return the Auto class that loads a pruned model of a model's kind; None where there is none."""
        return next((auto for auto, head in self.heads.items() if isinstance(model, _stock_of(head))), None)

    @property
    def file(self) -> str:
        """Name of a checkpoint's modeling file."""
        return f"modeling_{self.config.model_type}.py"

    @property
    def source(self) -> str:
        """Source of the modeling file, which ``trust_remote_code=True`` runs where flapkit is not installed."""
        config, *stock = (_stock_of(pruned) for pruned in (self.config, self.backbone, *self.heads.values()))
        head = CONFIG.format(
            prefix=PREFIX,
            dense=self.dense,
            config=config.__name__,
            config_module=config.__module__,
            stock=", ".join(base.__name__ for base in stock),
            model_module=stock[0].__module__,
        )
        classes = [CLASS.format(stock=base.__name__, config=config.__name__) for base in stock]
        return "".join([inspect.getsource(resize), head, *classes])

    @property
    def auto_map(self) -> dict[str, str]:
        """Auto class -> the class in the modeling file, as ``trust_remote_code=True`` reads it."""
        classes = {"AutoConfig": self.config, "AutoModel": self.backbone, **self.heads}
        return {auto: f"{self.file.removesuffix('.py')}.{pruned.__name__}" for auto, pruned in classes.items()}


def pruned_classes(model_type: str) -> PrunedClasses | None:
    """Make the classes of pruned models, and register them with the Auto classes.

    Args:
        model_type: of a dense or a pruned model.

    Returns:
        The classes, or None where transformers has no causal language model of that type.
    """
    dense = model_type.removeprefix(PREFIX)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return _make_classes(dense) if dense in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


@cache
def _make_classes(dense: str) -> PrunedClasses | None:
    import transformers

    stock: Any = transformers.CONFIG_MAPPING[dense]
    backbone, causal_lm, *others = (
        getattr(transformers, auto)._model_mapping.get(stock, None) for auto in ("AutoModel", *HEADS)
    )
    if backbone is None:
        return None
    config = strict(_derive(resize.FlapkitConfig, stock, model_type=f"{PREFIX}{dense}"))
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    pruned = {"AutoModel": backbone, CAUSAL_LM: causal_lm}
    for auto, model in zip(HEADS[1:], others, strict=True):
        # Sites are named as in the language model; some heads name the decoder otherwise.
        if model and (model.__module__, model.base_model_prefix) == (causal_lm.__module__, causal_lm.base_model_prefix):
            pruned[auto] = model
    for auto, model in pruned.items():
        pruned[auto] = _derive(resize.Resized, model, config_class=config)
        getattr(transformers, auto).register(config, pruned[auto], exist_ok=True)
    return PrunedClasses(dense, config, pruned.pop("AutoModel"), pruned)


def _stock_of(pruned: type) -> type:
    """Return the class of transformers' that a class of pruned models is derived from."""
    return pruned.__mro__[2]


def _derive(mixin: type, stock: Any, **attributes: Any) -> Any:
    attributes |= {"__module__": resize.__name__, "__doc__": f"{stock.__name__} of a pruned model."}
    return type(f"Flapkit{stock.__name__}", (mixin, stock), attributes)


def check_head(model: PreTrainedModel) -> str:
    """Return the Auto class that will load a model once it is pruned.

    Args:
        model: a dense or a pruned model.

    Raises:
        ModelError: there is no class to load such a model by.
    """
    classes = pruned_classes(model.config.model_type)
    head = classes.head_of(model) if classes else None
    if head is None:
        known = ", ".join(_stock_of(pruned).__name__ for pruned in classes.heads.values()) if classes else ""
        instead = f"; of this type, it can save {known}" if known else ""
        raise ModelError(f"flapkit has no class to save a pruned {type(model).__name__} by{instead}")
    return head


def dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the dense form of a pruned model's configuration; a dense configuration is returned as it is.

    Raises:
        ModelError: the dense model's configuration class does not accept its values.
    """
    import transformers

    if not config.model_type.startswith(PREFIX):
        return config
    stock: Any = transformers.CONFIG_MAPPING[config.model_type.removeprefix(PREFIX)]
    values = {key: value for key, value in config.to_dict().items() if key not in PRUNED_KEYS}
    if getattr(stock, HEAD_DIM, None) is None and values.get(HEAD_DIM) == _default_head_dim(config):
        del values[HEAD_DIM]
    return config_of(stock, values)


def _default_head_dim(config: PreTrainedConfig) -> int | None:
    """Return the size of a head where a configuration does not say it: the hidden size by the dense model's heads.

    None if these are no numbers of channels and heads.
    """
    values = config.to_dict()
    hidden, heads = (values[config.attribute_map.get(name, name)] for name in ("hidden_size", "num_attention_heads"))
    sound = all(isinstance(value, int) and value > 0 for value in (hidden, heads))
    return hidden // heads if sound else None


def set_pruned_config_(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Give a sliced model the configuration of its new sizes, in place.

    Afterwards ``save_pretrained`` writes a checkpoint that ``from_pretrained`` can load. A model whose sites come from
    no declaration keeps its dense configuration.

    Args:
        model: a model after ``slice_``.
        sites: its sites before slicing.
    """
    classes = pruned_classes(model.config.model_type)
    blocks = [block.data for block in {id(site.block): site.block for site in sites}.values() if block]
    if classes is None or any(site.block is None for site in sites):
        return
    dense = model.config.to_dict()
    layers: dict[int, dict[str, Any]] = {index: {} for index in range(len(model.config.per_layer_config))}
    for layer, values in dense.pop("per_layer_config", {}).items():
        layers[int(layer)].update(values)
    for site in sites:
        layers[site.layer].update(_sizes(model, site))
    _fill_missing_keys(layers, dense)
    dense.pop("model_type")
    # Falcon's class computes it.
    if not isinstance(getattr(type(model.config), HEAD_DIM, None), property) and not dense.get(HEAD_DIM):
        # Who reads the configuration alone, as vLLM does, would take the hidden size by the heads of the pruned layer.
        dense[HEAD_DIM] = _default_head_dim(model.config)
    declaration = {"layers": _layers_of(sites[0]), "blocks": _with_earlier(model, blocks)}
    _replace_config(model, classes.config.from_dict({**dense, "per_layer_config": layers, "flapkit": declaration}))


def _with_earlier(model: PreTrainedModel, blocks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the blocks of a pruning, and those of earlier ones whose sizes the layers still have."""
    earlier = getattr(model.config, "flapkit", None) or {"blocks": []}
    named = {block["name"]: block for block in [*earlier["blocks"], *blocks]}
    return list(named.values())


def reshape_(model: PreTrainedModel, values: Mapping[str, Any]) -> None:
    """Give a model the sizes of a pruned one, in place: its weights are to be loaded afterwards.

    Args:
        model: the model that was pruned, as it was before; one that has these sizes already stays as it is.
        values: the pruned model's configuration, as plain data.

    Raises:
        ModelError: the model is of another type, or other sizes.
    """
    classes = pruned_classes(model.config.model_type)
    if classes is None or classes.config.model_type != values.get("model_type"):
        raise ModelError(f"a {type(model).__name__} cannot be given the sizes of a {values.get('model_type')}")
    config = config_of(classes.config, {key: value for key, value in values.items() if key != "model_type"})
    if model.config.to_dict().get("per_layer_config") == config.to_dict()["per_layer_config"]:
        return
    layers: Any = model.get_submodule(config.flapkit["layers"])
    if len(layers) != len(config.per_layer_config):
        raise ModelError(f"the model has {len(layers)} layers, and the pruned one {len(config.per_layer_config)}")
    for layer, before, shape in zip(layers, model.config.per_layer_config, config.per_layer_config, strict=True):
        for block in config.flapkit["blocks"]:
            try:
                resize.resize_(layer, block, resize.heads_of(before, block), shape)
            except RuntimeError as error:
                raise ModelError(f"{block['name']}: the model is smaller than the pruned one: {error}") from error
    _replace_config(model, config)


def _replace_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give a model, and all of its modules, the configuration of a pruned one."""
    previous = model.config
    config.name_or_path = previous.name_or_path
    for name in ("_attn_implementation", "_experts_implementation"):
        setattr(config, name, getattr(previous, name))
    # Parameters are saved under their own names: the dense checkpoint's layout is not that of the derived classes.
    vars(model)["_weight_conversions"] = []
    for module in model.modules():
        current: Any = getattr(module, "config", None)
        if current is previous:
            setattr(module, "config", config)  # noqa: B010 - torch types attributes of modules as modules
        elif isinstance(current, resize.ConfigView) and current.of is previous:
            current.__dict__["of"] = config
    resize.pin_rotary_heads_(model)
    resize.share_cache_(model)


def _layers_of(site: Site) -> str:
    """Return the full name of the list of layers that contains a site's block."""
    return site.layer_path.removesuffix(f".{site.layer}")


def _fill_missing_keys(layers: dict[int, dict[str, Any]], dense: dict[str, Any]) -> None:
    """Give every layer all keys that any layer has: transformers requires this of keys without a global value."""
    names = {name: type(value) for layer in layers.values() for name, value in layer.items()}
    for layer in layers.values():
        for name, of in names.items():
            if name not in layer:
                layer[name] = dense.get(name, of() if of in (int, bool) else None)


def _sizes(model: PreTrainedModel, site: Site) -> dict[str, Any]:
    """Read one site's sizes from its consumer, with the keys of transformers' ``per_layer_config``."""
    block: Any = site.block
    if site.kind == "mixture":
        kept = len(model.get_parameter(site.weight))
        return {f"{block.name}_counts": block.counts(site.sizes(kept)), block.width: kept}
    removed = resize.removed_from(model.get_submodule(site.layer_path), block.data)
    kept = 0 if removed else model.get_parameter(site.weight).shape[site.dim] // site.channels_per_unit
    owner, _, leaf = site.bias.rpartition(".")
    entries: dict[str, Any] = {f"{block.name}_out_bias": getattr(model.get_submodule(owner), leaf, None) is not None}
    sizes = site.sizes(kept)
    for what, values in (("counts", block.counts), ("reads", block.readings)):
        if kept and (values := values(sizes)):
            entries[f"{block.name}_{what}"] = values
    if site.kind == "mlp":
        return {**entries, block.width: sizes["I"]}
    entries |= {"num_attention_heads": sizes["H"], block.heads: sizes["H"], "num_key_value_heads": sizes["K"]}
    if isinstance(block.kv_heads, str):
        entries[block.kv_heads] = sizes["K"]
    if kept and (block.arguments or block.outputs):
        module = model.get_submodule(site.path)
        entries["kept_heads"] = getattr(module, "kept_heads", list(range(site.heads)))
    return entries
