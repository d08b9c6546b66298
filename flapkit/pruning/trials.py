"""The objectives of trial searchers: perplexity, or KL divergence from the dense model, on held-out windows."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from flapkit.evaluation.perplexity import Perplexity, cross_entropy
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, groups
from flapkit.model.surgery import Correction, apply_plan_, copy_sharing_weights
from flapkit.pruning.collector import Batch, attended
from flapkit.system.errors import CalibrationError
from flapkit.system.float64 import float64_device
from flapkit.text.windows import UNSCORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIKELIEST = 512
"""Tokens whose predicted probabilities are compared; all others are compared as one."""

AT_ONCE = 2**25
"""Logits that are normalised at once: 128 MiB in float32."""

TRIAL_WINDOWS = 8
"""Windows in a batch."""


def held_out_windows(batches: Iterable[Batch]) -> list[Batch]:
    """Take the held-out windows of the calibration text, some in each batch.

    Raises:
        CalibrationError: there is none.
    """
    rows: list[Batch] = []
    for batch in batches:
        chosen = batch.get("held_out", torch.zeros(len(batch["input_ids"]))).bool()
        names = [name for name in ("input_ids", "attention_mask") if name in batch]
        rows += [{name: batch[name][index] for name in names} for index in chosen.nonzero().squeeze(1).tolist()]
    if not rows:
        raise CalibrationError(
            "calibration: plans are evaluated on held-out windows, one in four, and there are none; use at least "
            "four windows"
        )
    parts = [rows[start : start + TRIAL_WINDOWS] for start in range(0, len(rows), TRIAL_WINDOWS)]
    return [{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in parts]


class Trials:
    """Evaluates plans, each on a copy of the model that shares its weights.

    The corrections of a site are computed once for each set of kept units, and cached within the memory limit, so that
    a searcher that returns to the same sets pays only for slicing and forward passes.

    Args:
        model: the dense model.
        sites: its sites.
        kind: what is minimised.
        windows: the trial windows, in batches.
        correct: computes the corrections of some sites for a plan.
        memory: bytes of corrections to keep.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        kind: Literal["perplexity", "kl"],
        windows: Sequence[Batch],
        correct: Callable[[Sequence[Site], PruningPlan], Mapping[str, Correction]],
        memory: float,
    ) -> None:
        self._model = model
        self._groups = list(groups(sites))
        self._sites = sites
        self._windows = windows
        self._correct = correct
        self._known = _Corrections(memory)
        self._dense = [Predictions.of(model, batch) for batch in windows] if kind == "kl" else None

    def __call__(self, plan: PruningPlan, share: float = 1.0) -> float:
        """Return the perplexity, or the KL divergence in nats per token, over the first windows.

        Args:
            plan: the units to keep.
            share: of the windows.
        """
        copied = copy_sharing_weights(self._model, self._sites)
        apply_plan_(copied, self._sites, plan, self._corrections(plan))
        count = max(1, math.ceil(share * len(self._windows)))
        if self._dense is None:
            return perplexity_of(copied, self._windows[:count])
        return kl_of(copied, self._windows[:count], self._dense[:count])

    def _corrections(self, plan: PruningPlan) -> dict[str, Correction]:
        found: dict[str, Correction] = {}
        for together in self._groups:
            keys = {site.name: (site.name, plan.keep[site.name]) for site in together}
            known = {name: self._known.get(key) for name, key in keys.items()}
            if any(correction is None for correction in known.values()):
                known = dict(self._correct(together, plan))
                for name, correction in known.items():
                    if correction is not None:
                        self._known.put(keys[name], correction)
            found |= {name: correction for name, correction in known.items() if correction is not None}
        return found


class _Corrections:
    """Corrections by site and kept units; the least recently used ones are dropped when memory is full."""

    def __init__(self, memory: float) -> None:
        self._left = memory
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], Correction] = OrderedDict()

    def get(self, key: tuple[str, tuple[int, ...]]) -> Correction | None:
        """Find a correction."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: tuple[str, tuple[int, ...]], correction: Correction) -> None:
        """Keep a correction."""
        self._kept[key] = correction
        self._left -= _bytes(correction)
        while self._left < 0 and self._kept:
            self._left += _bytes(self._kept.popitem(last=False)[1])


def _bytes(correction: Correction) -> int:
    return sum(part.nbytes for part in (correction.weight, correction.bias) if part is not None)


@torch.no_grad()
def perplexity_of(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Return the perplexity over all tokens of some windows, on the model's device.

    Args:
        model: in evaluation mode.
        batches: mappings with ``input_ids`` [windows, tokens] and perhaps ``attention_mask``.
    """
    device = _device(model)
    measured = Perplexity().to(float64_device(device))
    for batch in batches:
        inputs: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = torch.where(attended(inputs), inputs["input_ids"], UNSCORED)
        measured.update(*cross_entropy(model(**inputs, use_cache=False).logits, labels))
    return float(measured.compute().over_tokens)


@dataclass(frozen=True, slots=True)
class Predictions:
    """What the dense model predicts after each token of a batch.

    Args:
        tokens: the likeliest next tokens [positions, k].
        logs: the logarithms of their probabilities, float32 [positions, k].
    """

    tokens: Tensor
    logs: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, batch: Batch) -> Predictions:
        """Run the dense model on a batch."""
        best = [logs.topk(min(LIKELIEST, logs.shape[-1])) for logs in _predicted(model, batch)]
        return cls(torch.cat([part.indices for part in best]).int(), torch.cat([part.values for part in best]))


@torch.no_grad()
def kl_of(model: PreTrainedModel, batches: Sequence[Batch], dense: Sequence[Predictions]) -> float:
    """Return the KL divergence of a model's predictions from the dense model's, in nats per token.

    All but the likeliest tokens are taken as one, which makes the divergence slightly smaller.

    Args:
        model: in evaluation mode.
        batches: the text.
        dense: what the dense model predicts for each batch.
    """
    total, positions = 0.0, 0
    for batch, wanted in zip(batches, dense, strict=True):
        start = 0
        for logs in _predicted(model, batch):
            ours = slice(start, start := start + len(logs))
            p, q = wanted.logs[ours], logs.gather(1, wanted.tokens[ours].long())
            rest = [(1 - part.exp().sum(dim=1)).clamp(min=1e-6) for part in (p, q)]
            divergence = (p.exp() * (p - q)).sum(dim=1) + rest[0] * (rest[0].log() - rest[1].log())
            total += float(divergence.sum())
        positions += start
    return total / positions


def _predicted(model: PreTrainedModel, batch: Batch) -> Iterable[Tensor]:
    """Yield the logarithms of the probabilities of the next token [positions, vocabulary], some positions at a time."""
    device = _device(model)
    inputs: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in batch.items()}
    logits: Tensor = model(**inputs, use_cache=False).logits
    kept = logits[attended(inputs).to(logits.device)]
    for part in kept.split(max(1, AT_ONCE // kept.shape[1])):
        yield part.float().log_softmax(dim=-1)


def _device(model: PreTrainedModel) -> torch.device:
    return next(model.get_input_embeddings().parameters()).device
