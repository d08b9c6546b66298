"""The objective of trial searchers: perplexity on held-out calibration windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flapkit.evaluation.perplexity import Perplexity, cross_entropy
from flapkit.pruning.collector import Batch, attended
from flapkit.system.errors import CalibrationError
from flapkit.text.windows import UNSCORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def held_out_windows(batches: Iterable[Batch]) -> list[Batch]:
    """Take the held-out windows of the calibration text.

    The statistics behind scores and corrections include these windows too.

    Raises:
        CalibrationError: there is none.
    """
    windows: list[Batch] = []
    for batch in batches:
        chosen = batch.get("held_out", torch.zeros(len(batch["input_ids"]))).bool()
        if chosen.any():
            names = [name for name in ("input_ids", "attention_mask") if name in batch]
            windows.append({name: batch[name][chosen] for name in names})
    if not windows:
        raise CalibrationError(
            "calibration: plans are evaluated on held-out windows, one in four, and there are none; use at least "
            "four windows"
        )
    return windows


@torch.no_grad()
def perplexity_of(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Return the perplexity over all tokens of some windows, on the model's device.

    Args:
        model: in evaluation mode.
        batches: mappings with ``input_ids`` [windows, tokens] and perhaps ``attention_mask``.
    """
    device = next(model.get_input_embeddings().parameters()).device
    measured = Perplexity().to(device)
    for batch in batches:
        inputs: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = torch.where(attended(inputs), inputs["input_ids"], UNSCORED)
        nll, targets = cross_entropy(model(**inputs, use_cache=False).logits, labels)
        measured.update(nll.to(device), targets.to(device))
    return float(measured.compute().over_tokens)
