"""Where the prunable places of a model family are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from transformers import PreTrainedConfig, PreTrainedModel

from flapkit.model.component import Component
from flapkit.model.declaration import Family, Unit
from flapkit.model.empty import skeleton
from flapkit.model.layout import sites_of
from flapkit.model.site import Site


class ArchitectureAdapter(Component):
    """Where the prunable places of a model family are."""

    @classmethod
    @abstractmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Tell whether a model of this configuration can be described."""

    @abstractmethod
    def sites(self, config: PreTrainedConfig) -> tuple[Site, ...]:
        """List the sites, in the model's order, from the configuration alone."""

    @property
    def title(self) -> str:
        """What ``flapkit check`` calls it."""
        return self.name

    def confirm(self, model: PreTrainedModel, sites: Sequence[Site]) -> None:
        """Raise ``ModelError`` where the sites turn out not to be those of the loaded model; asked before calibration.

        Args:
            model: the dense model, which is left as it is.
            sites: its sites.
        """
        return None

    def render(self, conversation: Sequence[Mapping[str, str]]) -> str | None:
        """Render a calibration conversation as this family was trained on it.

        Args:
            conversation: messages with ``role`` (``system``, ``user``, ``assistant``) and ``content``.

        Returns:
            The text, or None to use the tokenizer's own chat template.
        """
        return None


@dataclass(frozen=True)
class FamilyAdapter(ArchitectureAdapter):
    """An adapter that reads a declaration; subclass it where the declaration depends on the configuration."""

    family: ClassVar[Family]

    unit: Annotated[
        Unit,
        Field(
            description="What an attention unit is: a key/value head with its query heads (kv_group), or a query head "
            "of which every key/value head keeps the same number (query_head). With one key/value head for all, it is "
            "a query head wherever the family allows it."
        ),
    ] = "kv_group"

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Tell whether the configuration is the family's, dense or pruned already."""
        return config.model_type.removeprefix("flapkit_") in cls.family.model_types

    def family_of(self, config: PreTrainedConfig) -> Family:
        """Return the declaration for a configuration; a subclass can choose among several."""
        return self.family

    def sites(self, config: PreTrainedConfig) -> tuple[Site, ...]:
        """List the sites, with sizes read off the tensors of a model that is never allocated.

        Raises:
            ModelError: the declaration does not fit the model.
        """
        return sites_of(skeleton(config), self.family_of(config), self.unit)


def adapter_class(family: Family) -> type[FamilyAdapter]:
    """Make the adapter class of a declaration, which recipes can name."""
    about = family.about or f"Models of type {', '.join(family.model_types)}."
    members = {"name": family.name, "family": family, "__doc__": about, "__module__": __name__}
    made = type(f"{family.name.title().replace('_', '')}Adapter", (FamilyAdapter,), members)
    return dataclass(frozen=True)(made)
