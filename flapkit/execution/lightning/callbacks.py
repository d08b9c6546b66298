"""Lightning callbacks that calibrate, evaluate, report progress and recover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from torch import Tensor, nn
from transformers import PreTrainedModel

from flapkit.evaluation.perplexity import Perplexity, PerplexityValues
from flapkit.execution.shards import fill_, whole
from flapkit.model.site import Site
from flapkit.pruning.collector import Collector, Statistics
from flapkit.pruning.recovery import Recovery, Trainable, Training
from flapkit.pruning.statistics import Statistic
from flapkit.system.errors import RunError
from flapkit.system.float64 import float64_device
from flapkit.system.progress import Stage

LAST = "last"
"""Name of the checkpoint, without its suffix, from which a recovery goes on."""


class ProgressCallback(Callback):
    """Tell a stage of each batch that calibration or evaluation is done with.

    Of several processes each tells of its own share, as of a share of all: they keep step, more or less.

    Args:
        stage: counts windows.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *where: Any
    ) -> None:
        """Count a calibration batch."""
        self._count(trainer, len(batch["input_ids"]))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *where: Any
    ) -> None:
        """Count an evaluation batch."""
        self._count(trainer, len(batch["input_ids"]))

    def on_train_batch_end(self, trainer: Trainer, *what: Any) -> None:
        """Count optimizer steps; a resumed training begins with those that were done before."""
        self._stage.advance(trainer.global_step - self._stage.done)

    def _count(self, trainer: Trainer, windows: int) -> None:
        left = float("inf") if self._stage.total is None else self._stage.total - self._stage.done
        self._stage.advance(int(min(windows * trainer.world_size, left)))


class Calibrate(Callback):
    """Measure statistics while ``trainer.predict`` runs the calibration text through the backbone.

    Args:
        sites: where to measure.
        statistics: what to measure, as classes.
        stop_early: leave each forward pass after the last of the sites.

    Attributes:
        statistics: site name -> what was measured; merged over ranks at the end.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        statistics: Sequence[type[Statistic]],
        *,
        stop_early: bool = False,
    ) -> None:
        self._sites = sites
        self._classes = statistics
        self._stop_early = stop_early
        self._collector: Collector | None = None
        self.statistics: Statistics = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the consumers."""
        model = model_of(pl_module)
        self._collector = Collector(model, self._sites, self._classes, stop_early=self._stop_early)
        self._collector.__enter__()

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take note of which tokens count."""
        if self._collector:
            self._collector.begin(batch)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop at the first input that is not finite."""
        if self._collector:
            self._collector.check()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge what the ranks measured."""
        if self._collector:
            self._collector.merge()
            self.statistics = self._collector.statistics
        self._unhook()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Leave no hook behind."""
        self._unhook()

    def _unhook(self) -> None:
        if self._collector:
            self._collector.__exit__(None, None, None)
            self._collector = None


class Evaluate(Callback):
    """Measure perplexity while ``trainer.test`` runs.

    Args:
        names: what the evaluation texts are called, in the order of the loaders.

    Attributes:
        results: name -> both perplexities of the last test.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._metrics: list[Perplexity] = []
        self.results: dict[str, PerplexityValues] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._metrics = [Perplexity().to(float64_device(pl_module.device)) for _ in self._names]

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in a batch, and stop where a loss is not finite."""
        metric = self._metrics[dataloader_idx]
        metric.update(outputs["nll"], outputs["targets"])
        metric.check(self._names[dataloader_idx])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the ranks."""
        self.results = {name: metric.compute() for name, metric in zip(self._names, self._metrics, strict=True)}


class Recover(Callback):
    """Train a pruned model by a recovery while ``trainer.fit`` runs, and keep the best of it by validation.

    What is trained is put into the model in ``setup``, before the optimizer takes hold of the weights. ``fit`` may
    follow ``validate``, so that the pruned model itself is in the contest. Lightning's checkpoints hold the best so
    far, so that a resumed training ends as one that was not stopped.

    Args:
        recovery: what is trained, and how.
        sites: the model's sites.
        trainable: what is in the model already, as it has to be where the model is sharded; it is then left there.

    Attributes:
        trainable: what was put into the model; taken out again at the end where the recovery is to be merged.
        best: name of a parameter of the model that was trained -> its value in the best step, whole, on the CPU.
        validations: optimizer step -> mean cross-entropy of the validation text, in nats.
    """

    def __init__(self, recovery: Recovery, sites: Sequence[Site], trainable: Trainable | None = None) -> None:
        self._recovery = recovery
        self._sites = sites
        self._merges = recovery.merge and trainable is None
        self.best: dict[str, Tensor] = {}
        self.trainable = trainable
        self.validations: dict[int, float] = {}

    @property
    def best_step(self) -> int | None:
        """The step of the lowest validation loss, the first of several; None before there is one."""
        return min(self.validations, key=self.validations.__getitem__, default=None)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put in what is trained, once."""
        if self.trainable is None:
            self.trainable = self._recovery.begin(model_of(pl_module), self._sites)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Turn dropout on."""
        pl_module.train()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the dropout, so that a resumed training is as one that was not stopped."""
        torch.manual_seed(
            self._recovery.training.seed + trainer.current_epoch * trainer.world_size + trainer.global_rank
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at the first loss that is not finite, on every device."""
        finite = bool(torch.isfinite(outputs["loss"]))
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):
            raise not_finite(trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of the loss, and keep what was trained if it is the best."""
        loss = float(trainer.callback_metrics["validation/loss"])
        if not math.isfinite(loss):
            raise not_finite(trainer.global_step)
        self.validations[trainer.global_step] = loss
        if self.best_step == trainer.global_step:
            self.best = {name: whole(value.detach()).cpu().clone() for name, value in _trained(pl_module)}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the best, and merge it where that is asked for."""
        for name, value in _trained(pl_module):
            if name in self.best:
                fill_(value, self.best[name])
        pl_module.eval()
        if self._merges and self.trainable is not None:
            self.trainable.merge_()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training has to know."""
        return {"validations": self.validations, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.validations = dict(state_dict["validations"])
        self.best = dict(state_dict["best"])


def recovery_callbacks(training: Training, folder: Path | None, *, log_rate: bool) -> list[Callback]:
    """List what watches over a recovery beside ``Recover``.

    Args:
        training: may say when to stop early.
        folder: where Lightning's checkpoint ``last.ckpt`` is written after each validation; None for nowhere.
        log_rate: log the learning rate; there must be a logger then.
    """
    callbacks: list[Callback] = [LearningRateMonitor("step")] if log_rate else []
    if training.patience is not None:
        callbacks.append(EarlyStopping("validation/loss", patience=training.patience, check_finite=False))
    if folder is not None:
        callbacks.append(
            ModelCheckpoint(folder, LAST, save_on_train_epoch_end=True, every_n_epochs=1, enable_version_counter=False)
        )
    return callbacks


def not_finite(step: int) -> RunError:
    """Say that a training has failed, and what may help."""
    return RunError(
        f"the recovery's loss is not finite at step {step}; lower its lr, set trainer.gradient_clip_val, or choose "
        "another trainer.precision (bf16-mixed, 32-true)"
    )


def _trained(module: LightningModule) -> list[tuple[str, nn.Parameter]]:
    model = model_of(module)
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def model_of(module: LightningModule) -> PreTrainedModel:
    """Return the transformers model of a LightningModule, which keeps it in its attribute ``model``."""
    model = getattr(module, "model", None)
    if not isinstance(model, PreTrainedModel):
        raise RunError(f"{type(module).__name__} has no transformers model in its attribute `model`")
    return model
