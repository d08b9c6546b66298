"""Empty models: a configuration's model on the meta device, with shapes but no memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from flapkit.model.registration import dense_type
from flapkit.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CAUSAL_LM, IMAGE_TEXT = "AutoModelForCausalLM", "AutoModelForImageTextToText"
"""The Auto classes of language models: alone, and with a vision tower."""

DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
"""Configuration entries for the number of decoder layers."""

MOST_LAYERS = 1000
"""Upper limit of decoder layers: all of them are built, so a larger number, by mistake or malice, would take long."""


def auto_class(model_type: str) -> str | None:
    """Return the Auto class that loads a language model, alone or within a vision-language model.

    Args:
        model_type: of a dense or a pruned model.

    Returns:
        The name of the class, or None where transformers has none for the type.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as known

    dense = dense_type(model_type)
    if dense in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and "text_config" in CONFIG_MAPPING[dense].sub_configs:
        return IMAGE_TEXT
    return CAUSAL_LM if dense in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def sees(config: PreTrainedConfig) -> bool:
    """Return whether a configuration is that of a vision-language model."""
    return auto_class(config.model_type) == IMAGE_TEXT


def from_config(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Build the language model of a configuration by its Auto class, with the library's own code alone."""
    import transformers

    auto: Any = getattr(transformers, auto_class(config.model_type) or CAUSAL_LM)
    model: PreTrainedModel = auto.from_config(config, trust_remote_code=False, **options)
    return model


def build_empty(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a configuration's language model on the meta device.

    Raises:
        ModelError: transformers cannot build a model from the configuration.
    """
    from transformers.initialization import no_init_weights

    try:
        with torch.device("meta"), no_init_weights():
            model = from_config(config)
            # Without initialisation, tied weights would count twice.
            model.tie_weights()
    except Exception as error:
        raise ModelError(
            f"transformers cannot build a model from the configuration of type {config.model_type!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return model


def config_of(of: Any, values: Mapping[str, Any]) -> PreTrainedConfig:
    """Make a configuration from plain data.

    Args:
        of: the configuration's class.
        values: the output of ``to_dict``, or part of it.

    Raises:
        ModelError: the class does not accept the data.
    """
    try:
        config: PreTrainedConfig = of.from_dict(dict(values))
    except Exception as error:
        # Configuration classes validate in their own ways and may raise anything.
        raise ModelError(
            f"the configuration of type {of.model_type!r} is damaged: {type(error).__name__}: {error}"
        ) from error
    return config


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """A configuration as the key of a cache: two with the same class and the same entries are equal.

    Attributes:
        of: the configuration's class.
        values: its entries, as JSON.
    """

    of: type[PreTrainedConfig]
    values: str

    @classmethod
    def make(cls, config: PreTrainedConfig) -> ConfigKey:
        """Make the key of a configuration."""
        return cls(type(config), json.dumps(config.to_dict(), default=str, sort_keys=True))

    def config(self) -> PreTrainedConfig:
        """Make the configuration again."""
        return config_of(self.of, json.loads(self.values))


def check_depth(settings: Any) -> None:
    """Raise ``ModelError`` if a configuration, as plain data, has an impossible number of layers."""
    if not isinstance(settings, Mapping):
        raise ModelError(f"expected an object, found a {type(settings).__name__}")
    for part in (settings, *(value for value in settings.values() if isinstance(value, Mapping))):
        for key in DEPTHS:
            layers = part.get(key)
            if isinstance(layers, (int, float)) and not 0 < layers <= MOST_LAYERS:
                raise ModelError(f"{key} is {layers}, expected 1 to {MOST_LAYERS}")


def check_causal(config: PreTrainedConfig) -> None:
    """Raise ``ModelError`` unless a configuration is that of a decoder-only language model known to transformers.

    It may be that of a vision-language model, whose language model is pruned.
    """
    if config.is_encoder_decoder:
        raise ModelError(f"models of type {config.model_type!r} are encoder-decoders; flapkit prunes decoder-only ones")
    if auto_class(config.model_type) is None:
        raise ModelError(f"transformers has no causal language model of type {config.model_type!r}")


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a configuration's causal language model on the meta device; the result is cached.

    Raises:
        ModelError: transformers has no causal language model for it, or cannot build it.
    """
    check_causal(config)
    return _skeleton(ConfigKey.make(config))


@lru_cache(maxsize=4)
def _skeleton(key: ConfigKey) -> PreTrainedModel:
    return build_empty(key.config())
