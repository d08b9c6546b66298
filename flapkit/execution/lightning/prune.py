"""Lightning callbacks that prune and save a model; together with ``Calibrate`` they do what a recipe does."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from flapkit.checkpoint.save import save
from flapkit.execution.executor import CalibrationText, prune_
from flapkit.execution.lightning.callbacks import Calibrate, check_optimizers, model_of
from flapkit.execution.lightning.restore import KEY, restore_pruning_, state_of
from flapkit.execution.whole import WholeExecutor
from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.model.spread import is_spread
from flapkit.pruning.algorithm import Method, Pruned
from flapkit.system.errors import ModelError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Prune(Callback):
    """Score, search, correct and slice when calibration ends. Put it after ``Calibrate`` in the trainer's list.

    Args:
        calibrate: provides the statistics.
        sites: the model's sites.
        method: the metric, the searcher and the compensators.
        budget: how much to remove.

    Attributes:
        pruned: the scores and the applied plan; None before.
    """

    def __init__(self, calibrate: Calibrate, sites: Sequence[Site], method: Method, budget: Budget) -> None:
        self._calibrate = calibrate
        self._sites = sites
        self._method = method
        self._budget = budget
        self.pruned: Pruned | None = None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune the model in place."""
        loader: Any = trainer.predict_dataloaders
        text = CalibrationText(loader.dataset, loader.batch_size)
        executor = WholeExecutor(
            model_of(pl_module), self._sites, text, statistics=self._calibrate.statistics, memory=math.inf
        )
        # Lightning predicts under inference mode, and parameters made under it could never be trained.
        with torch.inference_mode(False):
            self.pruned = prune_(executor, self._method, self._budget)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to train float16 weights with an optimizer that would make them NaN."""
        check_optimizers(trainer)


class SaveCheckpoint(Callback):
    """Save the pruned model when a loop of the trainer ends. Put it after ``Prune`` in the trainer's list.

    Args:
        prune: provides the plan.
        path: the folder to write.
        after: the loop: ``predict`` saves right after pruning, ``fit`` after a recovery.
        options: options of ``flapkit.save``: ``tokenizer``, ``metadata``, ``files``, ``overwrite``.
    """

    def __init__(
        self, prune: Prune, path: Path | str, *, after: Literal["predict", "fit"] = "predict", **options: Any
    ) -> None:
        self._prune = prune
        self._path = path
        self._after = after
        self._options = options

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after pruning, if ``after`` is ``predict``."""
        if self._after == "predict":
            self._save(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after training, if ``after`` is ``fit``."""
        if self._after == "fit":
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._prune.pruned is None:
            raise RunError("SaveCheckpoint: the model is not pruned yet; put Prune before it in the trainer's list")
        if trainer.is_global_zero:
            save(model_of(pl_module), self._path, **self._options)


class PruneBeforeTraining(Callback):
    """Prune a model before it is trained, and before the optimizer is created.

    The module has its transformers model in the attribute ``model``. Lightning's checkpoints contain the plan: a
    resumed loop slices the model by it, without calibration.

    Attributes:
        plan: the applied plan; None before.
    """

    plan: PruningPlan | None = None
    _state: Mapping[str, str] | None = None

    @abstractmethod
    def prune(self, model: PreTrainedModel) -> PruningPlan:
        """Prune the model in place, on its device."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the model pruned once: by the checkpoint's plan if the trainer loads one, otherwise by calibration.

        Lightning says whether it loads a checkpoint only when it does so, which is after this hook. It then sets up its
        strategy: moves the model to its device, wraps it, and creates the optimizer. Between the two is the time to
        prune, and no hook; so one is added to both, for this loop.
        """
        strategy, restored = trainer.strategy, pl_module.on_load_checkpoint
        set_up = type(strategy).setup

        def restore(checkpoint: dict[str, Any]) -> None:
            self._keep(model_of(pl_module), restore_pruning_(model_of(pl_module), checkpoint))
            restored(checkpoint)

        def prune_and_set_up(of: Trainer) -> None:
            vars(strategy).pop("setup")
            vars(pl_module).pop("on_load_checkpoint")
            if self.plan is None:
                model = model_of(pl_module)
                if is_spread(model):
                    raise ModelError(
                        "the model is spread over several devices, and Lightning moves it to one; load it without "
                        "device_map"
                    )
                pl_module.to(strategy.root_device)
                self._keep(model, self.prune(model))
            set_up(strategy, of)

        vars(pl_module)["on_load_checkpoint"] = restore
        vars(strategy)["setup"] = prune_and_set_up

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to train float16 weights with an optimizer that would make them NaN."""
        check_optimizers(trainer)

    def _keep(self, model: PreTrainedModel, plan: PruningPlan) -> None:
        self.plan, self._state = plan, state_of(model, plan)

    @property
    def state_key(self) -> str:
        """The key of the plan in a checkpoint."""
        return KEY

    def state_dict(self) -> dict[str, Any]:
        """Return the plan, and the pruned model's configuration."""
        return dict(self._state or {})
