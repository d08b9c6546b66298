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
from flapkit.model.spread import embeddings_device
from flapkit.model.surgery import Correction, apply_plan_, copy_sharing_weights
from flapkit.pruning.collector import Batch, attended
from flapkit.system.errors import CalibrationError
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


Run = Callable[[int], Tensor]
"""Runs a model on a batch of the trial windows, given its number: the logits [windows, tokens, vocabulary]."""


class Judge:
    """Compares models on the trial windows: by their perplexity, or by their divergence from the dense model.

    Args:
        kind: what is measured.
        windows: the trial windows, in batches.
        dense: runs the dense model.
    """

    def __init__(self, kind: Literal["perplexity", "kl"], windows: Sequence[Batch], dense: Run) -> None:
        self.windows = windows
        self._dense = None
        if kind == "kl":
            with torch.no_grad():
                self._dense = [Predictions.of(dense(number), batch) for number, batch in enumerate(windows)]

    def first(self, share: float) -> Sequence[Batch]:
        """Return the batches that are a share of the trial windows: the first ones, at least one."""
        return self.windows[: max(1, math.ceil(share * len(self.windows)))]

    @torch.no_grad()
    def __call__(self, run: Run, share: float = 1.0) -> float:
        """Return the perplexity, or the KL divergence in nats per token, over the first windows.

        Args:
            run: runs the model.
            share: of the windows.
        """
        windows = self.first(share)
        return perplexity_of(run, windows) if self._dense is None else kl_of(run, windows, self._dense)


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
        self._judge = Judge(kind, windows, running(model, windows))
        self._correct = correct
        self._known = _Corrections(memory)

    def __call__(self, plan: PruningPlan, share: float = 1.0) -> float:
        """Return what the judge says of a plan's model.

        Args:
            plan: the units to keep.
            share: of the windows.
        """
        copied = copy_sharing_weights(self._model, self._sites)
        apply_plan_(copied, self._sites, plan, self._corrections(plan))
        return self._judge(running(copied, self._judge.windows), share)

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


def running(model: PreTrainedModel, batches: Sequence[Batch]) -> Run:
    """Return the function that runs a whole model on batches, on its device.

    Args:
        model: in evaluation mode.
        batches: mappings with ``input_ids`` [windows, tokens] and perhaps ``attention_mask``.
    """
    device = embeddings_device(model)

    def run(number: int) -> Tensor:
        inputs: dict[str, Tensor] = {name: tensor.to(device) for name, tensor in batches[number].items()}
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits

    return run


@torch.no_grad()
def perplexity_of(run: Run, batches: Sequence[Batch]) -> float:
    """Return the perplexity over all tokens of some windows.

    Args:
        run: runs the model.
        batches: mappings with ``input_ids`` [windows, tokens] and perhaps ``attention_mask``.
    """
    measured = Perplexity()
    for number, batch in enumerate(batches):
        logits = run(number)
        labels = torch.where(attended(batch), batch["input_ids"], UNSCORED)
        measured.update(*cross_entropy(logits, labels.to(logits.device)))
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
    def of(cls, logits: Tensor, batch: Batch) -> Predictions:
        """Keep the likeliest tokens of the dense model's logits [windows, tokens, vocabulary]."""
        best = [logs.topk(min(LIKELIEST, logs.shape[-1])) for logs in _predicted(logits, batch)]
        return cls(torch.cat([part.indices for part in best]).int(), torch.cat([part.values for part in best]))


@torch.no_grad()
def kl_of(run: Run, batches: Sequence[Batch], dense: Sequence[Predictions]) -> float:
    """Return the KL divergence of a model's predictions from the dense model's, in nats per token.

    All but the likeliest tokens are taken as one, which makes the divergence slightly smaller.

    Args:
        run: runs the model.
        batches: the text.
        dense: what the dense model predicts for each batch, at least as many.
    """
    total, positions = 0.0, 0
    for number, batch in enumerate(batches):
        start, wanted = 0, dense[number]
        for logs in _predicted(run(number), batch):
            ours = slice(start, start := start + len(logs))
            p, q = wanted.logs[ours], logs.gather(1, wanted.tokens[ours].long())
            rest = [(1 - part.exp().sum(dim=1)).clamp(min=1e-6) for part in (p, q)]
            divergence = (p.exp() * (p - q)).sum(dim=1) + rest[0] * (rest[0].log() - rest[1].log())
            total += float(divergence.sum())
        positions += start
    return total / positions


def _predicted(logits: Tensor, batch: Batch) -> Iterable[Tensor]:
    """Yield the logarithms of the probabilities of the next token [positions, vocabulary], some positions at a time."""
    kept = logits[attended(batch).to(logits.device)]
    for part in kept.split(max(1, AT_ONCE // kept.shape[1])):
        yield part.float().log_softmax(dim=-1)
