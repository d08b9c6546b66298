"""Lightning callbacks that calibrate, evaluate, report progress and recover."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from torch import Tensor, nn
from transformers import PreTrainedModel

from flapkit.evaluation.perplexity import Perplexity, PerplexityValues
from flapkit.execution.shards import fill_, gathered
from flapkit.model.site import Site
from flapkit.pruning.collector import Collector, Statistics
from flapkit.pruning.recovery import Recovery, Trainable, Training
from flapkit.pruning.statistics import Statistic
from flapkit.system.errors import RunError
from flapkit.system.float64 import float64_device
from flapkit.system.progress import Stage

LAST = "last"
"""Name of the checkpoint, without its suffix, from which a recovery resumes."""


class ProgressCallback(Callback):
    """Report finished batches to a stage.

    With several processes, every process multiplies its own count by their number, since they advance together.

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
        """Count optimizer steps; a resumed training starts with those done before."""
        self._stage.advance(trainer.global_step - self._stage.done)

    def _count(self, trainer: Trainer, windows: int) -> None:
        left = float("inf") if self._stage.total is None else self._stage.total - self._stage.done
        self._stage.advance(int(min(windows * trainer.world_size, left)))


class Calibrate(Callback):
    """Measure statistics while ``trainer.predict`` runs the calibration text through the backbone.

    Args:
        sites: the sites to measure.
        statistics: classes of the statistics.
        stop_early: end every forward pass after the last of the sites.

    Attributes:
        statistics: site name -> its statistics, merged over ranks; empty until the loop ends.
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
        """Select the tokens that count."""
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
        """Raise an error at the first input that is not finite."""
        if self._collector:
            self._collector.check()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the statistics of all ranks, and make them ordinary tensors, which a training can use."""
        if self._collector:
            self._collector.merge()
            self.statistics = self._collector.statistics
            _leave_inference_mode_(self.statistics)
        self._unhook()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Remove the hooks."""
        self._unhook()

    def _unhook(self) -> None:
        if self._collector:
            self._collector.__exit__(None, None, None)
            self._collector = None


class Evaluate(Callback):
    """Measure perplexity while ``trainer.test`` runs.

    Args:
        names: names of the evaluation texts, in the order of the loaders.

    Attributes:
        results: name -> both perplexities of the last test.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._metrics: list[Perplexity] = []
        self.results: dict[str, PerplexityValues] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start new metrics."""
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
        """Add a batch; raise an error if a loss is not finite."""
        if not isinstance(outputs, Mapping) or not {"nll", "targets"} <= outputs.keys():
            raise RunError(
                f"Evaluate: test_step of {type(pl_module).__name__} must return a mapping with `nll` and `targets`, "
                "each [windows], as that of flapkit.execution.lightning.module.CausalLM does; it returned "
                f"{_described(outputs)}"
            )
        metric = self._metrics[dataloader_idx]
        metric.update(outputs["nll"], outputs["targets"])
        metric.check(self._names[dataloader_idx])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the metrics of all ranks."""
        self.results = {name: metric.compute() for name, metric in zip(self._names, self._metrics, strict=True)}


class KeepBest(Callback):
    """Use the step with the lowest validation loss of a training; stop at the first loss that is not finite.

    If ``validate`` runs before ``fit``, the untrained parameters take part in the comparison. Lightning's checkpoints
    contain the best step so far, so that a resumed training ends like an uninterrupted one.

    Args:
        seed: seed of what is random in the training.
        what: what is trained, for messages.

    Attributes:
        best: name of a trained parameter -> its value at the best step, whole, on the CPU.
        losses: optimizer step, from 1 -> mean loss on its windows, in nats.
        validations: optimizer step -> mean loss on the validation text, in nats.
    """

    def __init__(self, seed: int, what: str) -> None:
        self._seed = seed
        self._what = what
        self.best: dict[str, Tensor] = {}
        self.losses: dict[int, float] = {}
        self.validations: dict[int, float] = {}
        self._accumulated = 0.0

    @property
    def best_step(self) -> int | None:
        """The first step with the lowest validation loss; None before the first validation."""
        return min(self.validations, key=self.validations.__getitem__, default=None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to train float16 weights with an optimizer that would make them NaN."""
        check_optimizers(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the dropout, so that a resumed training equals an uninterrupted one."""
        torch.manual_seed(self._seed + trainer.current_epoch * trainer.world_size + trainer.global_rank)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Store the loss of a step; raise an error on every device at the first one that is not finite."""
        # Of a step over several batches each loss is divided by their number. The mean over devices is not finite where
        # one of them is not.
        self._accumulated += float(trainer.strategy.reduce(outputs["loss"].float().clone()))
        if not math.isfinite(self._accumulated):
            raise self._not_finite(trainer.global_step)
        if trainer.global_step > max(self.losses, default=0):
            self.losses[trainer.global_step] = self._accumulated
            self._accumulated = 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the loss, and the trained parameters if it is the lowest."""
        loss = float(trainer.callback_metrics["validation/loss"])
        if not math.isfinite(loss):
            raise self._not_finite(trainer.global_step)
        self.validations[trainer.global_step] = loss
        if self.best_step == trainer.global_step:
            self.best = {name: gathered(value.detach()).cpu().clone() for name, value in _trained(pl_module)}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the best step."""
        for name, value in _trained(pl_module):
            if name in self.best:
                fill_(value, self.best[name])
        pl_module.eval()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed training."""
        return {"losses": self.losses, "validations": self.validations, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.losses, self.validations = dict(state_dict["losses"]), dict(state_dict["validations"])
        self.best = dict(state_dict["best"])

    def _not_finite(self, step: int, trained: str = "loss is") -> RunError:
        return RunError(
            f"the {self._what}'s {trained} not finite at step {step}; lower its lr, set trainer.gradient_clip_val, or "
            "choose another trainer.precision (bf16-mixed, 32-true)"
        )


class Recover(KeepBest):
    """Train a pruned model by a recovery while ``trainer.fit`` runs, and use the step with the lowest validation loss.

    The trainable part is attached in ``setup``, before the optimizer is created.

    Args:
        recovery: the recovery.
        sites: the model's sites.
        trainable: the trainable part, if it is already attached, as in a sharded model; it is then not merged.

    Attributes:
        trainable: the trainable part; merged at the end if the recovery merges.
    """

    def __init__(self, recovery: Recovery, sites: Sequence[Site], trainable: Trainable | None = None) -> None:
        super().__init__(recovery.training.seed, "recovery")
        self._recovery = recovery
        self._sites = sites
        self._merges = recovery.merge and trainable is None
        self.trainable = trainable

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the trainable part, once."""
        if self.trainable is None:
            self.trainable = self._recovery.begin(model_of(pl_module), self._sites)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Turn dropout on."""
        super().on_fit_start(trainer, pl_module)
        pl_module.train()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the best step, and merge it if the recovery merges."""
        super().on_fit_end(trainer, pl_module)
        if self._merges and self.trainable is not None:
            self.trainable.merge_()


class LearnGates(KeepBest):
    """Train the gates of a searcher while ``trainer.fit`` runs, and use the step with the lowest validation loss.

    The model stays in evaluation mode, as it will be pruned; only the gates are in training mode.

    Args:
        gates: the gates.
        seed: seed of what is random in the training.
        what: what is trained, for messages.
    """

    def __init__(self, gates: nn.Module, seed: int, what: str) -> None:
        super().__init__(seed, what)
        self._gates = gates

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Turn the training of the gates on."""
        super().on_fit_start(trainer, pl_module)
        pl_module.eval()
        self._gates.train()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Also raise an error at the first gates that are not finite, of which the loss need not tell.

        Gates that are open or closed make a finite loss, whatever the values that chose them.
        """
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not all(bool(torch.isfinite(values).all()) for values in self._gates.parameters()):
            raise self._not_finite(trainer.global_step, "gates are")


def recovery_callbacks(training: Training, folder: Path | None, *, log_rate: bool) -> list[Callback]:
    """List the other callbacks of a recovery: checkpoints, early stopping, learning rate.

    Args:
        training: its ``patience`` enables early stopping.
        folder: where Lightning's checkpoint ``last.ckpt`` is written after each validation; None for no checkpoint.
        log_rate: log the learning rate; this needs a logger.
    """
    callbacks: list[Callback] = [LearningRateMonitor("step")] if log_rate else []
    if training.patience is not None:
        callbacks.append(EarlyStopping("validation/loss", patience=training.patience, check_finite=False))
    if folder is not None:
        callbacks.append(
            ModelCheckpoint(folder, LAST, save_on_train_epoch_end=True, every_n_epochs=1, enable_version_counter=False)
        )
    return callbacks


def _leave_inference_mode_(statistics: Statistics) -> None:
    """Replace the tensors that Lightning's ``predict`` made under inference mode: no training could use them."""
    with torch.inference_mode(False):
        for statistic in (statistic for of_site in statistics.values() for statistic in of_site.values()):
            for name, value in statistic.state.items():
                if value.is_inference():
                    setattr(statistic, name, value.clone())


def check_optimizers(trainer: Trainer) -> None:
    """Raise ``RunError`` if an optimizer of torch would make the trainer's weights NaN, because they are float16.

    Adam and its relatives divide by the root of a mean square plus ``eps``, and 1e-8 is 0 in float16: a gradient of 0
    then becomes 0/0. Optimizers of other packages may compute in float32.
    """
    for optimizer in trainer.optimizers:
        kind = type(optimizer)
        if not kind.__module__.startswith("torch."):
            continue
        for group in optimizer.param_groups:
            eps = group.get("eps", 1.0)
            is_half = any(parameter.dtype == torch.float16 for parameter in group["params"])
            if is_half and not group.get("fused") and not torch.tensor(eps, dtype=torch.float16):
                raise RunError(
                    f"the weights to train are float16, in which the eps of {kind.__name__}, {eps:g}, is 0: the first "
                    "step would make them NaN. Train them in float32: call `model.float()` before (in a recipe: "
                    "`model.dtype: float32`), and set the trainer's precision to 32-true, bf16-mixed or 16-mixed"
                )


def _trained(module: LightningModule) -> list[tuple[str, nn.Parameter]]:
    model = model_of(module)
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _described(outputs: Any) -> str:
    """Describe what a step returned."""
    if isinstance(outputs, Mapping):
        return f"a mapping with {', '.join(map(str, outputs)) or 'nothing'}"
    return "None" if outputs is None else f"a {type(outputs).__name__}"


def model_of(module: LightningModule) -> PreTrainedModel:
    """Return the transformers model in the attribute ``model`` of a LightningModule."""
    model = getattr(module, "model", None)
    if not isinstance(model, PreTrainedModel):
        raise RunError(f"{type(module).__name__} has no transformers model in its attribute `model`")
    return model
