"""The base class of all components, and types for their options."""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from flapkit.system.errors import InputError
from flapkit.system.paths import to_path


class Component(ABC):
    """Base class of every component: adapters, metrics, searchers, compensators and exporters."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: ClassVar[str]
    """The component's name in recipes."""


def _resolve(path: Path | str, folder: Path | None = None) -> Path:
    try:
        return to_path(path, folder)
    except InputError as error:
        raise PydanticCustomError("path", "{what}", {"what": str(error)}) from error


def _check(text: str) -> str:
    _resolve(text)
    return text


def _find(path: Path, info: ValidationInfo) -> Path:
    """Make a path absolute and check that the file exists."""
    path = _resolve(path, (info.context or {}).get("folder")).absolute()
    if not path.is_file():
        raise PydanticCustomError("file", "file not found: {path}", {"path": str(path)})
    return path


File = Annotated[Path, AfterValidator(_find)]
"""An existing file; in a recipe, its path is relative to the recipe's folder."""


PathText = Annotated[str, AfterValidator(_check)]
"""Text that may be a path, such as a model's; paths that the system cannot have are refused."""


Count = Annotated[int, Field(le=2**31 - 1)]
"""A number of things; the limit is that of a 32-bit integer."""
