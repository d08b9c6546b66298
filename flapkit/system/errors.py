"""The errors that flapkit raises.

FlapkitError
├── InputError            the input is wrong; exit code 2
│   ├── RecipeError       a recipe, or an option given on the command line
│   ├── PluginError       a plugin or a component
│   ├── ModelError        a model folder, a checkpoint or an architecture
│   ├── DataError         a dataset, its fields, or too little text
│   ├── BudgetError       an invalid ratio, or one that the minimum widths do not allow
│   └── OutputError       an output that exists or cannot be written
└── RunError              the run started and failed; exit code 1
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
    """The input is wrong: a recipe, an option, a file or a model."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe, or an option on the command line, is wrong.

    Args:
        problems: every problem, one sentence each, which starts with its position.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class PluginError(InputError):
    """A plugin cannot be loaded, or a component breaks the contract of its interface."""


class ModelError(InputError):
    """A model folder, a checkpoint or an architecture cannot be used."""


class DataError(InputError):
    """A dataset cannot be read, or holds too little text."""


class BudgetError(InputError):
    """A budget cannot be met."""


class OutputError(InputError):
    """An output folder exists already, or cannot be written."""


class RunError(FlapkitError):
    """The run started and failed."""


class CalibrationError(RunError):
    """Calibration found activations that are not finite, or too few of them."""


def is_panic(error: BaseException) -> bool:
    """Return whether an error is a panic in a library's Rust code.

    Its class derives from ``BaseException`` and cannot be imported.
    """
    return type(error).__name__ == "PanicException"


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to ``name``, or None if none is similar."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Write the end of an error message: the closest known name, and the list of all."""
    names = sorted(known)
    close = closest(name, names)
    hint = f"; did you mean {close!r}?" if close else ""
    return f"{hint} (known: {', '.join(names) or 'none'})"
