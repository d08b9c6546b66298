"""Let transformers' Auto classes and PEFT know the types of pruned models, before any class is made for them.

Imports nothing heavy, and is safe to run while transformers is being imported.
"""

from __future__ import annotations

from typing import Any

from flapkit.system.errors import ModelError

PREFIX = "flapkit_"
"""What stands before a dense model's type in that of the pruned one."""


def dense_type(model_type: str) -> str:
    """Return the type of the dense model of a pruned one; that of a dense model as it is."""
    return model_type.removeprefix(PREFIX)


def is_pruned(config: Any) -> bool:
    """Tell whether a configuration is that of a pruned model."""
    return str(config.model_type).startswith(PREFIX)


class _Deferred:
    """Stands for a configuration class that is made when the first checkpoint of its type is loaded."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type
        self.__name__ = model_type

    def from_dict(self, config: dict[str, Any], **options: Any) -> Any:
        """Make the class, and let it read the configuration.

        Raises:
            ModelError: transformers has no language model of the type.
        """
        from flapkit.model.classes import pruned_classes

        made = pruned_classes(self.model_type)
        if made is None:
            raise ModelError(f"models of type {dense_type(self.model_type)!r} are not language models of transformers")
        return made.config.from_dict(config, **options)


def register(configuration_auto: Any) -> None:
    """Make transformers' Auto classes load pruned checkpoints; more than once does no harm.

    Args:
        configuration_auto: the module ``transformers.models.auto.configuration_auto``.
    """
    mapping = configuration_auto.CONFIG_MAPPING
    for dense in configuration_auto.CONFIG_MAPPING_NAMES:
        if f"{PREFIX}{dense}" not in mapping:
            mapping.register(f"{PREFIX}{dense}", _Deferred(f"{PREFIX}{dense}"))


def register_peft(constants: Any) -> None:
    """Let PEFT train of a pruned model what it trains of the dense one, where its configuration names no modules.

    Args:
        constants: the module ``peft.utils.constants``.
    """
    for name, modules in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
            # Some of these names are the same mapping.
            dense = {of: targets for of, targets in modules.items() if not of.startswith(PREFIX)}
            modules.update({f"{PREFIX}{of}": targets for of, targets in dense.items()})
