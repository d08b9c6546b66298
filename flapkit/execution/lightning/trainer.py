"""Build Lightning trainers for the stages of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from flapkit.system.errors import RecipeError

MODEL_PARALLEL = "model_parallel"
"""The strategy under which every process holds its share of each weight."""

TRAINER_DEFAULTS: Mapping[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    # Parameters made under inference mode could never be trained.
    "inference_mode": False,
}


def build_trainer(callbacks: Sequence[Callback], **options: Any) -> Trainer:
    """Build a trainer; by default without Lightning's logger, checkpoints and progress bar.

    Args:
        callbacks: the work of the stage.
        options: ``accelerator``, ``devices``, ``precision`` and others, as in Lightning.

    Raises:
        RecipeError: this machine lacks the device.
    """
    try:
        if options.get("strategy") == MODEL_PARALLEL:
            options["strategy"] = _model_parallel(options)
        return Trainer(callbacks=list(callbacks), **{**TRAINER_DEFAULTS, **options})
    except (MisconfigurationException, RuntimeError) as error:
        raise RecipeError(f"trainer: {error}; choose an accelerator of this machine, or `auto`") from error


def _model_parallel(options: Mapping[str, Any]) -> ModelParallelStrategy:
    """Build Lightning's strategy for a model that is sharded over all processes, which share the windows as well."""
    devices = {name: options[name] for name in ("accelerator", "devices", "num_nodes") if name in options}
    trainer = Trainer(**TRAINER_DEFAULTS, **devices)
    return ModelParallelStrategy(
        data_parallel_size=trainer.num_devices * trainer.num_nodes,
        tensor_parallel_size=1,
        # In one file, as under every other strategy: only trained parameters are saved, which are few.
        save_distributed_checkpoint=False,
    )


def init_processes(trainer: Trainer) -> None:
    """Initialise the process group; Lightning starts the processes unless a launcher did."""
    # Some strategies need a module.
    trainer.strategy.connect(LightningModule())
    launcher, begin = trainer.strategy.launcher, trainer.strategy.setup_environment
    if launcher is None:
        begin()
    else:
        launcher.launch(begin, trainer=trainer)
