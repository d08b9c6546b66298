"""Lightning callbacks that prune and save a model; together with ``Calibrate`` they do what a recipe does."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from flapkit.checkpoint.save import save
from flapkit.execution.executor import CalibrationText, prune_
from flapkit.execution.lightning.callbacks import Calibrate, model_of
from flapkit.execution.lightning.restore import KEY, restore_pruning_, resumes, state_of
from flapkit.execution.whole import WholeExecutor
from flapkit.model.budget import Budget
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.pruning.algorithm import Method, Pruned
from flapkit.system.errors import RunError

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
        self.pruned = prune_(executor, self._method, self._budget)


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
    """Prune a model before it is trained: in ``setup``, before the optimizer is created.

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
        """Prune once, on the trainer's device; or, if the trainer resumes, by the checkpoint's plan."""
        model = model_of(pl_module)
        if resumes(trainer):
            self._restore_on_load(pl_module)
        elif self.plan is None:
            pl_module.to(trainer.strategy.root_device)
            self.plan = self.prune(model)
            self._state = state_of(model, self.plan)

    def _restore_on_load(self, pl_module: LightningModule) -> None:
        """Make the module slice its model when the checkpoint is loaded, before its weights are; only once."""
        own = pl_module.on_load_checkpoint

        def restore(checkpoint: dict[str, Any]) -> None:
            del vars(pl_module)["on_load_checkpoint"]
            model = model_of(pl_module)
            self.plan = restore_pruning_(model, checkpoint)
            self._state = state_of(model, self.plan)
            own(checkpoint)

        vars(pl_module)["on_load_checkpoint"] = restore

    @property
    def state_key(self) -> str:
        """The key of the plan in a checkpoint."""
        return KEY

    def state_dict(self) -> dict[str, Any]:
        """Return the plan, and the pruned model's configuration."""
        return dict(self._state or {})
