"""The stage that trains a pruned model with Lightning."""

from __future__ import annotations

import json
import logging
import math
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flapkit.execution.executor import LearnedPlan
from flapkit.execution.lightning.callbacks import (
    LAST,
    KeepBest,
    LearnGates,
    ProgressCallback,
    Recover,
    recovery_callbacks,
)
from flapkit.execution.lightning.data import RecoveryData, held_out
from flapkit.execution.lightning.loggers import LoggerName, build_loggers
from flapkit.execution.lightning.module import CausalLM, GatedLM, Optimization
from flapkit.execution.runtime import Runtime, quietly
from flapkit.model.site import Site
from flapkit.pruning.collector import Batch
from flapkit.pruning.gates import GatedModel, Gates
from flapkit.pruning.recovery import VALIDATION_ONE_IN, Recovery, Trainable, Training
from flapkit.system.errors import CalibrationError, DataError, OutputError
from flapkit.system.json_files import read_object
from flapkit.system.processes import broadcast_from_rank0
from flapkit.system.workdir import damaged_as_output_error, differences, write_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG_POINTS = 100
"""How many training losses the loggers receive, approximately."""

TEXT = ("input_ids", "attention_mask")
"""What a training takes of a calibration batch."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RecoveryText:
    """The text of a recovery, as tokens.

    Args:
        windows: training windows, each used once and in order [windows, tokens].
        validation: validation windows [windows, tokens].
    """

    windows: Tensor
    validation: Tensor


@dataclass(frozen=True, slots=True)
class Recovered:
    """The result of a recovery.

    Args:
        trainable: the trained part; it is still in the model unless the recovery merged it.
        parameters: number of trained parameters.
        validations: optimizer step -> mean cross-entropy of the validation text, in nats.
        best_step: the step whose weights were chosen.
        weights: name of a trained parameter -> its value at that step, whole, on the CPU.
    """

    trainable: Trainable
    parameters: int
    validations: Mapping[int, float]
    best_step: int
    weights: Mapping[str, Tensor]

    def summary(self) -> dict[str, Any]:
        """Summarise it for ``result.json``."""
        return {
            "parameters": self.parameters,
            "best_step": self.best_step,
            "steps": max(self.validations),
            "validation_perplexity": {str(step): math.exp(loss) for step, loss in self.validations.items()},
        }


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where a recovery stores what it needs to resume.

    Args:
        folder: the folder; created if missing.
        identity: what the training depends on, as JSON; a checkpoint with another identity is not resumed.
        loggers: names of Lightning's loggers.
    """

    folder: Path
    identity: Mapping[str, Any]
    loggers: Sequence[LoggerName] = ()

    @property
    def checkpoint(self) -> Path:
        """Lightning's checkpoint."""
        return self.folder / f"{LAST}.ckpt"

    def open(self) -> Path | None:
        """Create the folder, and return the checkpoint to resume from, if there is one of this training.

        Call it in one process only.

        Raises:
            OutputError: the checkpoint is damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / "training.json"
        before = read_object(mark, OutputError) if mark.is_file() else {}
        changes = differences(before, self.identity)
        if not changes:
            if not self.checkpoint.is_file():
                return None
            _check_whole(self.checkpoint)
            return self.checkpoint
        if self.checkpoint.is_file():
            log.warning("recover: starting again, because the interrupted training differs: %s", "; ".join(changes))
            self.checkpoint.unlink()
        shutil.rmtree(self.folder / "logs", ignore_errors=True)
        write_file(mark, json.dumps(self.identity, indent=2))
        return None


def _check_whole(checkpoint: Path) -> None:
    with damaged_as_output_error(checkpoint):
        try:
            # Memory-mapped: a truncated file fails without being read.
            torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, AttributeError, TypeError) as error:
            raise ValueError(" ".join(str(error).split())) from error


def take_windows(training: Training, tokens: Tensor) -> RecoveryText:
    """Split windows into training windows, repeated in random orders as often as needed, and validation windows.

    Args:
        training: the number of windows, and the seed.
        tokens: [windows, tokens]; one window in ten is held out.

    Raises:
        DataError: there are fewer than ten windows, or the tokens have a wrong shape or dtype.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.long or len(tokens) < VALIDATION_ONE_IN:
        raise DataError(
            "recovery text: expected tokens as a LongTensor [windows, tokens] of at least "
            f"{VALIDATION_ONE_IN} windows, got {tokens.dtype} {list(tokens.shape)}"
        )
    validating = held_out(len(tokens), VALIDATION_ONE_IN)
    seen = tokens.cpu()[~validating]
    order = _shuffled(len(seen), training.steps * training.batch_size, training.seed)
    return RecoveryText(seen[order], tokens.cpu()[validating][: training.validation_windows])


def windows_per_step(training: Training, runtime: Runtime) -> int:
    """Return the windows of an optimizer step on all devices together: the effective batch size."""
    accumulated: int = runtime.options.get("accumulate_grad_batches", 1)
    return training.batch_size * accumulated * runtime.processes


def recover_(
    model: PreTrainedModel,
    sites: Sequence[Site],
    recovery: Recovery,
    text: RecoveryText,
    runtime: Runtime,
    *,
    workplace: Workplace | None = None,
    teacher: PreTrainedModel | None = None,
    trainable: Trainable | None = None,
) -> Recovered:
    """Train a pruned model in place, and use the step with the lowest validation loss; step 0 is the pruned model.

    Args:
        model: the pruned model.
        sites: its sites.
        recovery: the recovery.
        text: as many windows as the steps need.
        runtime: what it runs on.
        workplace: where checkpoints and logs are written, and an interrupted training is resumed from.
        teacher: the dense model, whose predictions are learned as well.
        trainable: the trainable part, if it is already attached; it is then not merged.

    Raises:
        RunError: a loss is not finite.
    """
    training = recovery.training
    recover = Recover(recovery, sites, trainable)
    module = CausalLM(model, _optimization(training), teacher=teacher)
    per_epoch = training.validate_every * windows_per_step(training, runtime)
    data = RecoveryData(text.windows, text.validation, batch_size=training.batch_size, per_epoch=per_epoch)
    trained = _fit(module, data, recover, training, runtime, workplace, "recover")
    assert recover.trainable is not None
    assert recover.best_step is not None
    parameters = sum(parameter.numel() for parameter in trained)
    recovered = Recovered(recover.trainable, parameters, recover.validations, recover.best_step, recover.best)
    _log_result(recovered)
    return recovered


def learn_plan(
    model: PreTrainedModel,
    sites: Sequence[Site],
    gates: Gates,
    training: Training,
    text: Sequence[Batch],
    runtime: Runtime,
    *,
    workplace: Workplace | None = None,
) -> LearnedPlan:
    """Train gates with the model's weights frozen, and return the plan of the step with the lowest validation loss.

    Args:
        model: the dense model, unchanged at the end.
        sites: the gated sites.
        gates: the gates.
        training: how they are trained.
        text: the calibration text; the windows that are ``held_out`` choose the step.
        runtime: what it runs on.
        workplace: where checkpoints and logs are written, and an interrupted training is resumed from.

    Raises:
        CalibrationError: there are no windows to train on, or to choose the step by.
        RunError: a loss is not finite.
    """
    windows, validation = _split_calibration(training, text, windows_per_step(training, runtime), runtime.processes)
    data = RecoveryData(
        windows,
        validation,
        batch_size=training.batch_size,
        per_epoch=training.validate_every * windows_per_step(training, runtime),
    )
    gated = GatedModel(model, sites, gates)
    learn = LearnGates(gates, training.seed, "search")
    try:
        _fit(GatedLM(model, gated, _optimization(training)), data, learn, training, runtime, workplace, "search")
        plan = gates.plan()
    finally:
        gated.remove_()
    assert learn.best_step is not None
    first, best = (learn.validations[step] for step in (0, learn.best_step))
    log.info("search: loss %.4f -> %.4f, step %d of %d", first, best, learn.best_step, max(learn.validations))
    return LearnedPlan(plan, learn.losses, learn.validations, learn.best_step)


def _split_calibration(
    training: Training, text: Sequence[Batch], per_step: int, processes: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split calibration windows into training windows, in random orders as often as needed, and held-out ones."""
    together = {name: torch.cat([batch[name] for batch in text]) for name in (*TEXT, "held_out")}
    validating = together["held_out"].bool()
    chosen = validating.nonzero()[: training.validation_windows, 0]
    chosen = chosen[: len(chosen) - len(chosen) % processes]
    left = (~validating).nonzero()[:, 0]
    if not len(left) or not len(chosen):
        raise CalibrationError(
            "calibration: gates are trained on three windows of four, and the best step is chosen on the fourth; use "
            f"at least {4 * processes} windows"
        )
    order = left[_shuffled(len(left), training.steps * per_step, training.seed)]
    return ({name: together[name][order] for name in TEXT}, {name: together[name][chosen] for name in TEXT})


def _shuffled(count: int, needed: int, seed: int) -> Tensor:
    """Return as many indices below ``count`` as needed, in one random order after another."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-needed // count))]
    return torch.cat(rounds)[:needed]


def _fit(
    module: CausalLM,
    data: RecoveryData,
    keep: KeepBest,
    training: Training,
    runtime: Runtime,
    workplace: Workplace | None,
    name: str,
) -> list[nn.Parameter]:
    """Validate, train, and validate regularly; return the trained parameters."""
    model = module.model
    resumed = broadcast_from_rank0(workplace.open) if workplace else None
    options = {**_options(training), **_precision(model, runtime), **_logging(workplace)}
    with torch.random.fork_rng(), runtime.progress.stage(name, training.steps, "steps") as stage:
        folder = workplace.folder if workplace else None
        watching = recovery_callbacks(training, folder, log_rate=bool(workplace and workplace.loggers))
        trainer = runtime.trainer([keep, *watching, ProgressCallback(stage)], **options)
        quietly(trainer.validate, module, data, verbose=False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if resumed:
            log.info("%s: resuming from %s", name, resumed)
        quietly(trainer.fit, module, data, ckpt_path=resumed, weights_only=True)
    return trained


def _optimization(training: Training) -> Optimization:
    return Optimization(lr=training.lr, weight_decay=training.weight_decay, warmup=training.warmup)


def _options(training: Training) -> dict[str, Any]:
    return {
        "max_steps": training.steps,
        "max_epochs": -1,
        "reload_dataloaders_every_n_epochs": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": max(1, training.steps // LOG_POINTS),
    }


def _precision(model: PreTrainedModel, runtime: Runtime) -> dict[str, Any]:
    """Choose mixed precision for a float16 model, whose gradients would vanish, unless the recipe sets a precision."""
    if "precision" in runtime.options or model.dtype != torch.float16:
        return {}
    on_cuda = runtime.device.type == "cuda"
    precision = "16-mixed" if on_cuda and not runtime.sharded else "bf16-mixed"
    log.info("recover: the weights are float16; training in %s (trainer.precision overrides this)", precision)
    return {"precision": precision}


def _logging(workplace: Workplace | None) -> dict[str, Any]:
    if workplace is None:
        return {}
    return {"enable_checkpointing": True, "logger": build_loggers(workplace.loggers, workplace.folder)}


def _log_result(recovered: Recovered) -> None:
    first, best = (math.exp(recovered.validations[step]) for step in (0, recovered.best_step))
    if recovered.best_step == 0:
        log.warning(
            "recovery: no step was better than the pruned model (validation perplexity %.3f), which stays unchanged; "
            "try another lr, more steps, or text closer to the validation text",
            first,
        )
    else:
        last = max(recovered.validations)
        log.info("recover: validation perplexity %.3f -> %.3f, step %d of %d", first, best, recovered.best_step, last)
