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
from flapkit.model.empty import CAUSAL_LM, IMAGE_TEXT, auto_class, config_of
from flapkit.model.registration import PREFIX, dense_type, is_pruned
from flapkit.model.site import Site
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PRUNED_KEYS = ("per_layer_config", "flapkit", "kv_sharing_modes", "model_type", "auto_map", "architectures")
"""Configuration entries of a pruned checkpoint that a dense one lacks, or has with another value."""

TEXT = "text_config"
"""The entry of a vision-language model's configuration for its language model."""

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

HEADS = (
    CAUSAL_LM,
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
"""The Auto classes of models that can be pruned; a vision-language model has ``IMAGE_TEXT`` alone."""


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
        The classes, or None where transformers has no language model of that type.
    """
    return _make_classes(dense_type(model_type)) if auto_class(model_type) else None


@cache
def _make_classes(dense: str) -> PrunedClasses | None:
    import transformers

    stock: Any = transformers.CONFIG_MAPPING[dense]
    heads = (IMAGE_TEXT,) if auto_class(dense) == IMAGE_TEXT else HEADS
    backbone, language_model, *others = (
        getattr(transformers, auto)._model_mapping.get(stock, None) for auto in ("AutoModel", *heads)
    )
    if backbone is None:
        return None
    config = strict(_derive(resize.FlapkitConfig, stock, model_type=f"{PREFIX}{dense}"))
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    pruned = {"AutoModel": backbone, heads[0]: language_model}
    place = (language_model.__module__, language_model.base_model_prefix)
    for auto, model in zip(heads[1:], others, strict=True):
        # Sites are named as in the language model; some heads name the decoder otherwise.
        if model and (model.__module__, model.base_model_prefix) == place:
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

    if not is_pruned(config):
        return config
    stock: Any = transformers.CONFIG_MAPPING[dense_type(config.model_type)]
    text, values = config.get_text_config(), _dense_values(config)
    if text is not config:
        values[TEXT] = {**_dense_values(text), "model_type": dense_type(text.model_type)}
    return config_of(stock, values)


def _dense_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the entries of a pruned model's configuration, or its language model's, that the dense one has, too."""
    values = {key: value for key, value in config.to_dict().items() if key not in PRUNED_KEYS}
    stock: Any = resize.stock_of(type(config))
    if HEAD_DIM in values and getattr(stock, HEAD_DIM, None) is None and values[HEAD_DIM] == _default_head_dim(config):
        del values[HEAD_DIM]
    return values


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
    text = model.config.get_text_config()
    dense = text.to_dict()
    layers: dict[int, dict[str, Any]] = {index: {} for index in range(len(text.per_layer_config))}
    for layer, values in dense.pop("per_layer_config", {}).items():
        layers[int(layer)].update(values)
    for site in sites:
        layers[site.layer].update(_sizes(model, site))
    _fill_missing_keys(layers, dense)
    # Falcon's class computes it.
    if not isinstance(getattr(type(text), HEAD_DIM, None), property) and not dense.get(HEAD_DIM):
        # Who reads the configuration alone, as vLLM does, would take the hidden size by the heads of the pruned layer.
        dense[HEAD_DIM] = _default_head_dim(text)
    values = {**dense, "per_layer_config": layers}
    if text is not model.config:
        values = {**model.config.to_dict(), TEXT: values}
    values.pop("model_type")
    declaration = {"layers": _layers_of(sites[0]), "blocks": _with_earlier(model, blocks)}
    _replace_config(model, classes.config.from_dict({**values, "flapkit": declaration}))


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
    old, new = model.config.get_text_config(), config.get_text_config()
    if old.to_dict().get("per_layer_config") == new.to_dict()["per_layer_config"]:
        return
    layers: Any = model.get_submodule(config.flapkit["layers"])
    if len(layers) != len(new.per_layer_config):
        raise ModelError(f"the model has {len(layers)} layers, and the pruned one {len(new.per_layer_config)}")
    for layer, before, shape in zip(layers, old.per_layer_config, new.per_layer_config, strict=True):
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
    replaced: list[tuple[Any, Any]] = [(previous, config)]
    if (text := previous.get_text_config()) is not previous:
        replaced.append((text, config.get_text_config()))
        # The other parts, such as a vision tower, stay what they are.
        for name in type(config).sub_configs.keys() - {TEXT}:
            setattr(config, name, getattr(previous, name))
    for name in ("_attn_implementation", "_experts_implementation"):
        # A mapping sets the parts that it names alone.
        chosen = getattr(previous, name)
        setattr(config, name, chosen if text is previous else {"": chosen, TEXT: getattr(text, name)})
    # Parameters are saved under their own names: the dense checkpoint's layout is not that of the derived classes.
    vars(model)["_weight_conversions"] = []
    for module in model.modules():
        current: Any = getattr(module, "config", None)
        for old, new in replaced:
            if current is old:
                setattr(module, "config", new)  # noqa: B010 - torch types attributes of modules as modules
            elif isinstance(current, resize.ConfigView) and current.of is old:
                current.__dict__["of"] = new
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
