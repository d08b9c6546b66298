"""The base class of all components."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from pydantic import ConfigDict


class Component(ABC):
    """What all interfaces share."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    """The component's name in recipes."""
