"""Architecture adapters: where the sites of a model family are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from flapkit.model.component import Component
from flapkit.model.declaration import ExpertUnit, Family, Unit, UnitOption, with_experts
from flapkit.model.empty import skeleton
from flapkit.model.layout import sites_of
from flapkit.model.registration import dense_type
from flapkit.model.site import Site
from flapkit.model.verify import verify_declared

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class ArchitectureAdapter(Component):
    """Knows where the sites of a model family are."""

    @classmethod
    @abstractmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Return whether the adapter knows models of this configuration."""

    @abstractmethod
    def sites(self, config: PreTrainedConfig) -> tuple[Site, ...]:
        """Return the sites in the model's order, from the configuration alone."""

    @property
    def title(self) -> str:
        """The adapter's name in the output of ``flapkit check``."""
        return self.name

    def check_declaration(self, config: PreTrainedConfig) -> None:
        """Check the declaration that the sites come from, if there is one; called before any weights are read.

        Args:
            config: the model's configuration.

        Raises:
            ModelError: the declaration is wrong for such models.
        """
        return None

    def confirm(self, model: PreTrainedModel, sites: Sequence[Site]) -> None:
        """Check the sites against the loaded model; called before calibration.

        Args:
            model: the dense model; it is not changed.
            sites: its sites.

        Raises:
            ModelError: the sites do not fit the model.
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
        UnitOption,
        Field(
            description="The attention unit: a key/value head with its query heads (kv_group), or a single query head, "
            "with the same number kept for every key/value head (query_head). Models with a single key/value head use "
            "query heads wherever the family allows it. `auto` takes query heads where the family, the budget and the "
            "exports allow them; `flapkit check` prints the choice and the reason."
        ),
    ] = "kv_group"
    expert_unit: Annotated[
        ExpertUnit,
        Field(
            description="What is removed of a mixture of experts: channels of every expert (channel), whole experts "
            "with their part of the router (expert), or whole experts and channels of those that stay (both)."
        ),
    ] = "channel"

    @property
    def title(self) -> str:
        """The adapter's name, with the origin of the declaration."""
        return f"{self.name} (declared and verified)"

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Return whether the configuration belongs to the family, dense or already pruned."""
        return dense_type(config.model_type) in cls.family.model_types

    def family_of(self, config: PreTrainedConfig) -> Family:
        """Return the declaration for a configuration; a subclass may choose among several."""
        return self.family

    def sites(self, config: PreTrainedConfig) -> tuple[Site, ...]:
        """Return the sites; their sizes are read from a model on the meta device.

        Raises:
            ModelError: the declaration does not fit the model.
        """
        family = with_experts(self.family_of(config), self.expert_unit)
        return sites_of(skeleton(config), family, _unit_of(family) if self.unit == "auto" else self.unit)

    def check_declaration(self, config: PreTrainedConfig) -> None:
        """Verify the declaration on a tiny random model of the configuration's class."""
        verify_declared(self, config)


def _unit_of(family: Family) -> Unit:
    """Return the smallest attention unit that a declaration allows."""
    attention = [block for block in family.blocks if block.kind == "attention"]
    return "query_head" if all(block.takes_query_heads for block in attention) else "kv_group"


@cache
def adapter_class(family: Family) -> type[FamilyAdapter]:
    """Make an adapter class from a declaration, so that recipes can name it; always the same one.

    What was verified of a declaration is so known in every registry.
    """
    about = family.about or f"Models of type {', '.join(family.model_types)}."
    members = {"name": family.name, "family": family, "__doc__": about, "__module__": __name__}
    made = type(f"{family.name.title().replace('_', '')}Adapter", (FamilyAdapter,), members)
    return dataclass(frozen=True)(made)
