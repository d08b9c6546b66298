"""The transformers classes that pruned models are loaded by, derived from each family's stock classes.

transformers' own classes cannot be built from a configuration whose layers differ; a derived class builds the stock
model and resizes its layers. Any causal language model of transformers has such classes: they are made when they are
first asked for. ``register`` makes the Auto classes ask.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flapkit.model import resize as modeling_flapkit
from flapkit.model.empty import config_of
from flapkit.model.site import Site

PREFIX = "flapkit_"

ADDED = ("per_layer_config", "flapkit", "model_type", "auto_map", "architectures")
"""What a pruned checkpoint's configuration says that a dense one does not, or says otherwise."""

TAIL = '''

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
"""What a checkpoint's modeling file adds to ``modeling_flapkit.py``; ``pruned_classes`` makes the same classes."""


@dataclass(frozen=True, slots=True)
class PrunedClasses:
    """The classes of one model type's pruned models.

    Args:
        dense: model type of the dense models.
        config: configuration class of the pruned ones.
        backbone: their decoder's class.
        causal_lm: their language model's class.
    """

    dense: str
    config: type[PreTrainedConfig]
    backbone: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]

    @property
    def file(self) -> str:
        """Name of the modeling file in a checkpoint."""
        return f"modeling_{self.config.model_type}.py"

    def code(self, blocks: Sequence[Mapping[str, Any]]) -> str:
        """Write the modeling file: what ``trust_remote_code=True`` runs where flapkit is not installed.

        Args:
            blocks: the blocks of a decoder layer, as the checkpoint's configuration declares them.
        """
        config, backbone, causal_lm = (each.__mro__[2] for each in (self.config, self.backbone, self.causal_lm))
        return _source_for(blocks) + TAIL.format(
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
        """Where ``trust_remote_code=True`` finds each Auto class's model in a checkpoint."""
        classes = {"AutoConfig": self.config, "AutoModel": self.backbone, "AutoModelForCausalLM": self.causal_lm}
        return {auto: f"{self.file.removesuffix('.py')}.{found.__name__}" for auto, found in classes.items()}


def _source_for(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Read ``modeling_flapkit.py`` less the hooks that no block of a model needs."""
    needed: dict[Any, bool] = {
        modeling_flapkit.ExpertBias: any(block["kind"] == "experts" for block in blocks),
        modeling_flapkit.KeptArgument: any(block["arguments"] for block in blocks),
        modeling_flapkit.KeptOutput: any(block["outputs"] for block in blocks),
        modeling_flapkit.keep_heads_: any(block["arguments"] or block["outputs"] for block in blocks),
    }
    source = inspect.getsource(modeling_flapkit)
    for hook, is_needed in needed.items():
        if not is_needed:
            source = source.replace(inspect.getsource(hook), "")
    return re.sub(r"\n{4,}", "\n\n\n", source).rstrip() + "\n"


def pruned_classes(model_type: str) -> PrunedClasses | None:
    """Make the classes of pruned models, and let the Auto classes know them.

    Args:
        model_type: a dense or a pruned model's.

    Returns:
        The classes, or None where transformers has no causal language model of that type.
    """
    dense = model_type.removeprefix(PREFIX)
    return _make_classes(dense) if dense in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


@cache
def _make_classes(dense: str) -> PrunedClasses:
    stock: Any = CONFIG_MAPPING[dense]
    config = strict(_derive(modeling_flapkit.FlapkitConfig, stock, model_type=f"{PREFIX}{dense}"))
    causal_lm, backbone = (
        _derive(modeling_flapkit.Resized, auto._model_mapping[stock], config_class=config)
        for auto in (AutoModelForCausalLM, AutoModel)
    )
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, backbone, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    return PrunedClasses(dense, config, backbone, causal_lm)


def _derive(mixin: type, stock: Any, **attributes: Any) -> Any:
    attributes |= {"__module__": modeling_flapkit.__name__, "__doc__": f"A pruned model's {stock.__name__}."}
    return type(f"Flapkit{stock.__name__}", (mixin, stock), attributes)


class _Deferred:
    """Stands for a configuration class that is made when the first checkpoint of its type is loaded."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type
        self.__name__ = model_type

    def from_dict(self, config: dict[str, Any], **options: Any) -> Any:
        """Make the class, and let it read the configuration."""
        made = pruned_classes(self.model_type)
        assert made is not None
        return made.config.from_dict(config, **options)


def register() -> None:
    """Make transformers' Auto classes load pruned checkpoints; more than once does no harm."""
    for dense in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if f"{PREFIX}{dense}" not in CONFIG_MAPPING:
            deferred: Any = _Deferred(f"{PREFIX}{dense}")
            CONFIG_MAPPING.register(f"{PREFIX}{dense}", deferred)


def dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the dense form of a pruned model's configuration; a dense one stays as it is.

    Raises:
        ModelError: the dense model's class does not take what it holds.
    """
    if not config.model_type.startswith(PREFIX):
        return config
    kept = {key: value for key, value in config.to_dict().items() if key not in ADDED}
    return config_of(CONFIG_MAPPING[config.model_type.removeprefix(PREFIX)], kept)


def describe_(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Give a sliced model the configuration that says what it has become, in place.

    From then on ``save_pretrained`` writes what ``from_pretrained`` can read. A model whose sites come from no
    declaration keeps its dense configuration.

    Args:
        model: a model after ``slice_``.
        sites: its sites as they were before.
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
    _complete(layers, dense)
    dense.pop("model_type")
    declaration = {"layers": _layers_of(sites[0]), "blocks": [block.data for block in blocks if block]}
    config = classes.config.from_dict({**dense, "per_layer_config": layers, "flapkit": declaration})
    config.name_or_path = model.config.name_or_path
    for name in ("_attn_implementation", "_experts_implementation"):
        setattr(config, name, getattr(model.config, name))
    _replace_config(model, config)
    # The names are saved as they are: a layout that the dense checkpoint had is not that of the derived classes.
    vars(model)["_weight_conversions"] = []


def _replace_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    previous = model.config
    for module in model.modules():
        held: Any = getattr(module, "config", None)
        if held is previous:
            setattr(module, "config", config)  # noqa: B010 - torch types attributes of modules as modules
        elif isinstance(held, modeling_flapkit.ConfigView) and held.of is previous:
            held.__dict__["of"] = config
    modeling_flapkit.hold_heads_(model)


def _layers_of(site: Site) -> str:
    """Return the full name of the list of layers that a site's block is in."""
    inner = f".{site.layer}" + (f".{site.block.path}" if site.block and site.block.path else "")
    return site.path.removesuffix(inner)


def _complete(layers: dict[int, dict[str, Any]], dense: dict[str, Any]) -> None:
    """Give each layer every key that any has, as transformers asks where a key has no global value."""
    names = {name: type(value) for layer in layers.values() for name, value in layer.items()}
    for layer in layers.values():
        for name, of in names.items():
            if name not in layer:
                layer[name] = dense.get(name, of() if of in (int, bool) else None)


def _sizes(model: PreTrainedModel, site: Site) -> dict[str, Any]:
    """Read one site's sizes off its consumer, in the words of transformers' ``per_layer_config``."""
    block: Any = site.block
    kept = model.get_parameter(site.weight).shape[site.dim] // site.channels_per_unit
    module = model.get_submodule(site.path)
    *path, leaf = site.bias.removeprefix(f"{site.path}.").split(".")
    has_bias = getattr(module.get_submodule(".".join(path)), leaf, None) is not None
    found: dict[str, Any] = {f"{block.name}_out_bias": has_bias}
    sizes = site.sizes(kept)
    for what, values in (("counts", block.counts(sizes)), ("reads", block.readings(sizes))):
        if values:
            found[f"{block.name}_{what}"] = values
    if site.kind == "mlp":
        return {**found, block.width: sizes["I"]}
    found |= {"num_attention_heads": sizes["H"], block.heads: sizes["H"], "num_key_value_heads": sizes["K"]}
    if isinstance(block.kv_heads, str):
        found[block.kv_heads] = sizes["K"]
    if block.arguments or block.outputs:
        found["kept_heads"] = getattr(module, "kept_heads", list(range(site.heads)))
    return found
