"""The causal language model as a LightningModule: calibration, perplexity and training steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from flapkit.evaluation.perplexity import cross_entropy
from flapkit.execution.lightning.restore import KEY, restore_pruning_
from flapkit.model.spread import embeddings_device, is_spread
from flapkit.pruning.collector import attended, run_batch
from flapkit.pruning.gates import GatedModel
from flapkit.pruning.recovery import divergence

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Optimization:
    """How a model is trained: AdamW with a linear warm-up and a cosine decay to zero.

    Args:
        lr: peak learning rate.
        weight_decay: decoupled weight decay of matrices; vectors (norms, biases) get none.
        warmup: fraction of the steps in which the learning rate rises.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup: float = 0.05


class CausalLM(LightningModule):
    """A causal language model as a LightningModule.

    Batches are mappings with ``input_ids`` [windows, tokens] and ``attention_mask`` of the same shape.

    - ``predict_step`` is the calibration forward pass: the backbone without logits; with ``calibrate_gradient``, also
      the loss and its backward pass.
    - ``test_step`` returns each window's cross-entropy in nats.
    - ``training_step`` returns the language-modelling loss; with a teacher, plus the divergence from it.

    Lightning's checkpoints contain only trained parameters.

    Args:
        model: the language model. One that is spread over several devices stays where it is, and is not trained.
        optimization: how it is trained.
        calibrate_gradient: calibration needs a backward pass.
        teacher: a model whose predictions are matched in training; not a submodule.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimization: Optimization | None = None,
        *,
        calibrate_gradient: bool = False,
        teacher: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        if is_spread(model):
            # Not as a submodule, so that Lightning leaves each weight on its device.
            vars(self)["model"] = model
        else:
            self.model = model
        self.calibrate_gradient = calibrate_gradient
        self.optimization = optimization or Optimization()
        # In a tuple, so that torch does not register it as a submodule.
        self._teachers = () if teacher is None else (teacher,)

    def configure_model(self) -> None:
        """Leave the model as it is: a sharded model is sharded when it is loaded (``flapkit.execution.shards``).

        Lightning's checkpoints need not contain frozen parameters.
        """
        self.strict_loading = not self._frozen()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Slice the model to the checkpoint's sizes, if it was trained with ``FlapPruning``."""
        if KEY in checkpoint.get("callbacks", {}):
            restore_pruning_(self.model, checkpoint)

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> int:
        """Run the decoder layers for the hooks that measure them; return the number of windows."""
        run_batch(self.model, batch, gradient=self.calibrate_gradient)
        return len(batch["input_ids"])

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return each window's summed cross-entropy in nats and its number of scored tokens, both [windows]."""
        device = embeddings_device(self.model) if is_spread(self.model) else self.device
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        logits = self.model(**inputs, use_cache=False).logits
        nll, targets = cross_entropy(logits, batch["labels"].to(logits.device))
        return {"nll": nll, "targets": targets}

    def training_step(self, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the next token, in nats, and the divergence from the teacher if any."""
        student = self.model(**batch, labels=batch["input_ids"], use_cache=False)
        loss: Tensor = student.loss
        for teacher in self._teachers:
            with torch.no_grad():
                logits = teacher(**batch, use_cache=False).logits
            loss = loss + divergence(student.logits, logits, attended(batch))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch) -> None:
        """Log the mean cross-entropy of the next token, in nats, as ``validation/loss``, and the perplexity."""
        loss = self.model(**batch, labels=batch["input_ids"], use_cache=False).loss
        self.log("validation/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity of the whole validation text."""
        loss = self.trainer.callback_metrics["validation/loss"]
        self.log("validation/perplexity", loss.exp(), sync_dist=True)

    def on_fit_start(self) -> None:
        """Move the teacher to the model's device."""
        for teacher in self._teachers:
            nn.Module.to(teacher, self.device)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the trained parameters, for Lightning's checkpoints; the frozen ones are most of the model."""
        frozen = self._frozen()
        return {name: value for name, value in super().state_dict(*args, **options).items() if name not in frozen}

    def _frozen(self) -> set[str]:
        named = self.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if not parameter.requires_grad}

    def configure_optimizers(self) -> Any:
        """Build AdamW and its schedule over the trainer's number of steps."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": self.optimization.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=self.optimization.lr, betas=(0.9, 0.95))
        steps = int(self.trainer.estimated_stepping_batches)
        # Not at the top: its module imports peft.
        from transformers import get_cosine_schedule_with_warmup

        schedule = get_cosine_schedule_with_warmup(optimizer, int(self.optimization.warmup * steps), steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class GatedLM(CausalLM):
    """A language model whose gates are trained, its weights frozen. The dense model is the same one without its gates.

    Args:
        model: the language model.
        gated: its gates.
        optimization: how they are trained.
    """

    def __init__(self, model: PreTrainedModel, gated: GatedModel, optimization: Optimization) -> None:
        super().__init__(model, optimization)
        self._gated = gated
        # All processes have the same buffers, also those that are computed later: the covariances of all sites, which
        # DistributedDataParallel would otherwise send to every process before each step.
        buffers = [f"{name}.{buffer}" for name, module in self.named_modules() for buffer in module._buffers]
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(self, buffers)  # type: ignore[no-untyped-call]

    def training_step(self, batch: Batch) -> Tensor:
        """Return the loss of the gates, in nats per predicted token."""
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch) -> None:
        """Log the loss of the gates as ``validation/loss``."""
        windows = len(batch["input_ids"])
        self.log("validation/loss", self._loss(batch), prog_bar=True, batch_size=windows, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log nothing more: the loss is no logarithm of a perplexity."""

    def _loss(self, batch: Batch) -> Tensor:
        with self._gated.dense():
            dense = self.model(**batch, use_cache=False).logits
        logits = self.model(**batch, use_cache=False).logits
        return self._gated.gates.loss(logits, dense, batch["input_ids"], attended(batch))
