"""What YAML files declare: their sections, and the types of options beside those that pydantic knows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from flapkit.system.errors import InputError
from flapkit.system.paths import to_path


class Section(BaseModel):
    """A part of a YAML file: immutable, its types taken at their word, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


def _reach(path: Path | str, folder: Path | None = None) -> Path:
    try:
        return to_path(path, folder)
    except InputError as error:
        raise PydanticCustomError("path", "{what}", {"what": str(error)}) from error


def _check(text: str) -> str:
    _reach(text)
    return text


def _find(path: Path, info: ValidationInfo) -> Path:
    """Make a path absolute, and check that the file is there."""
    folders = (info.context or {}).get("folders", {})
    path = _reach(path, folders.get(info.field_name)).absolute()
    if not path.is_file():
        raise PydanticCustomError("file", "file not found: {path}", {"path": str(path)})
    return path


File = Annotated[Path, AfterValidator(_find)]
"""A file that has to be there, relative to the recipe's folder or, in ``--set``, to the current directory."""


PathText = Annotated[str, Field(min_length=1), AfterValidator(_check)]
"""Text that may be a path, such as a model's: neither empty nor a path that no file can have."""


Count = Annotated[int, Field(le=2**31 - 1)]
"""How many of something; memory and time end long before this does."""
