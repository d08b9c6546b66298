"""Types of components' options, beside those that pydantic knows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo
from pydantic_core import PydanticCustomError


def _find(path: Path, info: ValidationInfo) -> Path:
    """Make a path absolute, and check that the file is there."""
    folder = (info.context or {}).get("folder", Path())
    path = (folder / path.expanduser()).absolute()
    if not path.is_file():
        raise PydanticCustomError("file", "there is no such file: {path}", {"path": str(path)})
    return path


File = Annotated[Path, AfterValidator(_find)]
"""A file that has to be there; in a recipe its path is relative to the recipe's folder."""
