"""The errors that flapkit raises.

FlapkitError
├── InputError            what was asked for cannot be done as asked; exit code 2
│   ├── RecipeError       a recipe, or an option given on the command line
│   ├── PluginError       a plugin or a component
│   ├── ModelError        a model folder, a checkpoint or an architecture
│   ├── DataError         a dataset, its fields, or too little text
│   ├── BudgetError       a ratio that is no ratio, or that the floors do not allow
│   └── OutputError       an output folder that exists or cannot be written
└── RunError              the work began and failed; exit code 1
    └── CalibrationError  activations that are not finite, or too few of them
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class FlapkitError(Exception):
    """The root of every error that flapkit raises on purpose."""

    exit_code: ClassVar[int] = 1


class InputError(FlapkitError):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe, or an option on the command line, is wrong.

    Args:
        problems: everything that is wrong, each a sentence that begins with its place.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class PluginError(InputError):
    """A plugin cannot be loaded, or a component does not keep its interface's promise."""


class ModelError(InputError):
    """A model folder, a checkpoint or an architecture cannot be used."""


class DataError(InputError):
    """A dataset cannot be read, or holds too little text."""


class BudgetError(InputError):
    """A budget cannot be met."""


class OutputError(InputError):
    """An output folder exists already, or cannot be written."""


class RunError(FlapkitError):
    """The work began and failed."""


class CalibrationError(RunError):
    """Calibration met activations that are not finite, or too few of them."""


def is_panic(error: BaseException) -> bool:
    """Tell whether an error is a panic of a library's Rust code, which is no ``Exception`` and cannot be imported."""
    return type(error).__name__ == "PanicException"


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant, if any is near."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, and list them all: the tail of an error message."""
    names = sorted(known)
    close = closest(name, names)
    hint = f"; did you mean {close!r}?" if close else ""
    return f"{hint} (known: {', '.join(names) or 'none'})"
