"""Lightning's loggers by name: files, and the services that are installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flapkit.system.errors import RecipeError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]

PROJECT = "flapkit"
"""Default name of the project in services."""


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Raise ``RecipeError``, with what to install, if a logger's package is missing."""
    for name in names:
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise RecipeError(
                f'trainer.logger: {name} is not installed; install it with: pip install "flapkit[{name}]"'
            )


def build_loggers(names: Sequence[LoggerName], folder: Path, version: str | None = None) -> list[Logger]:
    """Build loggers.

    ``csv`` and ``tensorboard`` write to ``folder/logs``. ``wandb`` and ``mlflow`` are configured by their own
    environment variables (``WANDB_PROJECT``, ``WANDB_MODE``; ``MLFLOW_TRACKING_URI``).

    Args:
        names: names of the loggers.
        folder: folder of those that write files.
        version: the folder below ``logs``; by default ``version_0``, or the next free one.

    Raises:
        RecipeError: a logger's package is not installed.
    """
    check_loggers(names)
    # Set here, so that several loggers share a folder.
    version = version or f"version_{len(list((folder / 'logs').glob('version_*')))}"
    return [_build(name, folder, version) for name in names]


def _build(name: LoggerName, folder: Path, version: str) -> Logger:
    # Lightning takes seconds to import; checking a recipe does not need it.
    from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

    if name == "csv":
        return CSVLogger(folder, name="logs", version=version)
    if name == "tensorboard":
        return TensorBoardLogger(folder, name="logs", version=version)
    if name == "wandb":
        return WandbLogger(project=os.environ.get("WANDB_PROJECT", PROJECT), save_dir=folder)
    # Lightning's default is a folder of files, which MLflow no longer writes.
    return MLFlowLogger(PROJECT, tracking_uri=importlib.import_module("mlflow").get_tracking_uri())
