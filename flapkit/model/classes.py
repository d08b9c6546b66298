"""The transformers classes that load pruned models, derived from the stock classes of each model type.

transformers' own classes cannot be built from a configuration with layers of different sizes. A derived class builds
the stock model and resizes its layers. The classes of a model type are made on first use;
``flapkit.model.registration`` announces them to the Auto classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub.dataclasses import strict

from flapkit.model import resize
from flapkit.model.empty import config_of
from flapkit.model.registration import PREFIX
from flapkit.model.site import Site

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PRUNED_KEYS = ("per_layer_config", "flapkit", "model_type", "auto_map", "architectures")
"""Configuration entries of a pruned checkpoint that a dense one lacks, or has with another value."""

CLASSES = '''

from huggingface_hub.dataclasses import strict
from {config_module} import {config}
from {model_module} import {backbone}, {causal_lm}


@strict
class Flapkit{config}(FlapkitConfig, {config}):
    """The configuration of a pruned {dense}."""
    model_type = "{prefix}{dense}"


class Flapkit{backbone}(Resized, {backbone}):
    """The decoder of a pruned {dense}."""
    config_class = Flapkit{config}


class Flapkit{causal_lm}(Resized, {causal_lm}):
    """A pruned {dense} with its language-modelling head."""
    config_class = Flapkit{config}
'''
"""The end of a checkpoint's modeling file, after the source of ``resize.py``; the classes of ``pruned_classes``."""


@dataclass(frozen=True, slots=True)
class PrunedClasses:
    """The classes of pruned models of one model type.

    Args:
        dense: model type of the dense model.
        config: configuration class of pruned models.
        backbone: class of the decoder without its head.
        causal_lm: class of the language model.
    """

    dense: str
    config: type[PreTrainedConfig]
    backbone: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]

    @property
    def file(self) -> str:
        """Name of a checkpoint's modeling file."""
        return f"modeling_{self.config.model_type}.py"

    @property
    def source(self) -> str:
        """Source of the modeling file, which ``trust_remote_code=True`` runs where flapkit is not installed."""
        config, backbone, causal_lm = (pruned.__mro__[2] for pruned in (self.config, self.backbone, self.causal_lm))
        return inspect.getsource(resize) + CLASSES.format(
            prefix=PREFIX,
            dense=self.dense,
            config=config.__name__,
            config_module=config.__module__,
            backbone=backbone.__name__,
            causal_lm=causal_lm.__name__,
            model_module=causal_lm.__module__,
        )

    @property
    def auto_map(self) -> dict[str, str]:
        """Auto class -> the class in the modeling file, as ``trust_remote_code=True`` reads it."""
        classes = {"AutoConfig": self.config, "AutoModel": self.backbone, "AutoModelForCausalLM": self.causal_lm}
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
def _make_classes(dense: str) -> PrunedClasses:
    stock: Any = transformers.CONFIG_MAPPING[dense]
    config = strict(_derive(resize.FlapkitConfig, stock, model_type=f"{PREFIX}{dense}"))
    causal_lm, backbone = (
        _derive(resize.Resized, auto._model_mapping[stock], config_class=config)
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel)
    )
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    transformers.AutoModel.register(config, backbone, exist_ok=True)
    transformers.AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    return PrunedClasses(dense, config, backbone, causal_lm)


def _derive(mixin: type, stock: Any, **attributes: Any) -> Any:
    attributes |= {"__module__": resize.__name__, "__doc__": f"{stock.__name__} of a pruned model."}
    return type(f"Flapkit{stock.__name__}", (mixin, stock), attributes)


def dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the dense form of a pruned model's configuration; a dense configuration is returned as it is.

    Raises:
        ModelError: the dense model's configuration class does not accept its values.
    """
    if not config.model_type.startswith(PREFIX):
        return config
    values = {key: value for key, value in config.to_dict().items() if key not in PRUNED_KEYS}
    return config_of(transformers.CONFIG_MAPPING[config.model_type.removeprefix(PREFIX)], values)


def set_pruned_config_(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Give a sliced model the configuration of its new sizes, in place.

    Afterwards ``save_pretrained`` writes a checkpoint that ``from_pretrained`` can load. A model whose sites come from
    no declaration keeps its dense configuration.

    Args:
        model: a model after ``slice_``.
        sites: its sites before slicing.
    """
    classes = pruned_classes(model.config.model_type)
    blocks = list({id(site.block): site.block for site in sites}.values())
    if classes is None or None in blocks:
        return
    dense = model.config.to_dict()
    layers: dict[int, dict[str, Any]] = {index: {} for index in range(len(model.config.per_layer_config))}
    for layer, values in dense.pop("per_layer_config", {}).items():
        layers[int(layer)].update(values)
    for site in sites:
        layers[site.layer].update(_sizes(model, site))
    _fill_missing_keys(layers, dense)
    dense.pop("model_type")
    declaration = {"layers": _layers_of(sites[0]), "blocks": [block.data for block in blocks if block]}
    config = classes.config.from_dict({**dense, "per_layer_config": layers, "flapkit": declaration})
    config.name_or_path = model.config.name_or_path
    for name in ("_attn_implementation", "_experts_implementation"):
        setattr(config, name, getattr(model.config, name))
    _replace_config(model, config)
    # Parameters are saved under their own names: the dense checkpoint's layout is not that of the derived classes.
    vars(model)["_weight_conversions"] = []


def _replace_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    previous = model.config
    for module in model.modules():
        current: Any = getattr(module, "config", None)
        if current is previous:
            setattr(module, "config", config)  # noqa: B010 - torch types attributes of modules as modules
        elif isinstance(current, resize.ConfigView) and current.of is previous:
            current.__dict__["of"] = config
    resize.pin_rotary_heads_(model)


def _layers_of(site: Site) -> str:
    """Return the full name of the list of layers that contains a site's block."""
    inner = f".{site.layer}" + (f".{site.block.path}" if site.block and site.block.path else "")
    return site.path.removesuffix(inner)


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
    kept = model.get_parameter(site.weight).shape[site.dim] // site.channels_per_unit
    module = model.get_submodule(site.path)
    *path, leaf = site.bias.removeprefix(f"{site.path}.").split(".")
    has_bias = getattr(module.get_submodule(".".join(path)), leaf, None) is not None
    entries: dict[str, Any] = {f"{block.name}_out_bias": has_bias}
    sizes = site.sizes(kept)
    for what, values in (("counts", block.counts(sizes)), ("reads", block.readings(sizes))):
        if values:
            entries[f"{block.name}_{what}"] = values
    if site.kind == "mlp":
        return {**entries, block.width: sizes["I"]}
    entries |= {"num_attention_heads": sizes["H"], block.heads: sizes["H"], "num_key_value_heads": sizes["K"]}
    if isinstance(block.kv_heads, str):
        entries[block.kv_heads] = sizes["K"]
    if block.arguments or block.outputs:
        entries["kept_heads"] = getattr(module, "kept_heads", list(range(site.heads)))
    return entries
