"""Build Lightning trainers for the stages of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from flapkit.system.errors import RecipeError

MODEL_PARALLEL = "model_parallel"
"""The strategy under which each process holds its share of every weight."""


TRAINER_DEFAULTS: Mapping[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    # Parameters made under inference mode could never be trained.
    "inference_mode": False,
}


def build_trainer(callbacks: Sequence[Callback], **options: Any) -> Trainer:
    """Build the trainer of a run: no logger, no checkpoints and no progress bar of Lightning's own, unless asked for.

    Args:
        callbacks: the stages.
        options: ``accelerator``, ``devices``, ``precision`` and all else as Lightning takes it.

    Raises:
        RecipeError: a device that this machine does not have.
    """
    try:
        if options.get("strategy") == MODEL_PARALLEL:
            options["strategy"] = _model_parallel(options)
        return Trainer(callbacks=list(callbacks), **{**TRAINER_DEFAULTS, **options})
    except (MisconfigurationException, RuntimeError) as error:
        raise RecipeError(f"trainer: {error}; choose an accelerator that is here, or `auto`") from error


def _model_parallel(options: Mapping[str, Any]) -> ModelParallelStrategy:
    """Build Lightning's strategy for a model that is sharded over all processes, each with its share of the windows."""
    asked = {name: options[name] for name in ("accelerator", "devices", "num_nodes") if name in options}
    trainer = Trainer(**TRAINER_DEFAULTS, **asked)
    return ModelParallelStrategy(
        data_parallel_size=trainer.num_devices * trainer.num_nodes,
        tensor_parallel_size=1,
        # In one file, as under every other strategy: what is saved of a training is small.
        save_distributed_checkpoint=False,
    )


def init_processes(trainer: Trainer) -> None:
    """Let the processes of a run know of each other; Lightning starts them where nothing else did."""
    # Some strategies tell the module that they run.
    trainer.strategy.connect(LightningModule())
    launcher, begin = trainer.strategy.launcher, trainer.strategy.setup_environment
    if launcher is None:
        begin()
    else:
        launcher.launch(begin, trainer=trainer)
