"""Perplexity: cross-entropy per window, and its mean over windows or over tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from flapkit.system.errors import RunError
from flapkit.text.windows import UNSCORED

CHUNK_ELEMENTS = 2**24
"""Number of logits converted to float32 at once: 64 MiB."""


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of each window's scored tokens, predicted from the logits one position earlier.

    Args:
        logits: [windows, tokens, vocabulary], any floating dtype; converted to float32 in chunks.
        labels: [windows, tokens]: the token if it is scored, else -100. The first token is never scored.

    Returns:
        The sums in nats, float32 [windows], and the number of scored tokens, int64 [windows].
    """
    windows, tokens, vocabulary = logits.shape
    targets = torch.full_like(labels, UNSCORED)
    targets[:, :-1] = labels[:, 1:]
    scored = (targets != UNSCORED).flatten().nonzero().squeeze(1)
    flat_logits, flat_targets = logits.reshape(-1, vocabulary), targets.flatten()
    losses = torch.zeros(windows * tokens, dtype=torch.float32, device=logits.device)
    for places in torch.split(scored, max(1, CHUNK_ELEMENTS // vocabulary)):
        losses[places] = functional.cross_entropy(flat_logits[places].float(), flat_targets[places], reduction="none")
    return losses.view(windows, tokens).sum(dim=1), (targets != UNSCORED).sum(dim=1)


class PerplexityValues(NamedTuple):
    """Perplexity by both means of the cross-entropy; they are equal if all windows score the same number of tokens.

    Args:
        over_windows: exp of the mean over windows of each window's mean, float64 []: the released code's protocol.
        over_tokens: exp of the mean over all scored tokens, float64 []: the strided protocol.
        nll: the summed cross-entropy in nats, float64 [].
    """

    over_windows: Tensor
    over_tokens: Tensor
    nll: Tensor


class Perplexity(Metric):
    """Perplexity over windows and over tokens, summed in float64.

    A loss that is not finite makes both values infinite or NaN; ``is_finite`` returns this at any time.
    """

    full_state_update = False

    nll: Tensor
    targets: Tensor
    window_means: Tensor
    windows: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, dtype in (
            ("nll", torch.float64),
            ("targets", torch.int64),
            ("window_means", torch.float64),
            ("windows", torch.int64),
        ):
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")

    def update(self, nll: Tensor, targets: Tensor) -> None:
        """Add windows; those without scored tokens are ignored.

        Args:
            nll: summed cross-entropy of each window in nats [windows].
            targets: number of scored tokens of each window [windows].
        """
        # The sums are on the CPU where the device has no float64.
        nll, targets = nll.to(self.nll.device), targets.to(self.nll.device)
        scored = targets > 0
        nll, targets = nll[scored].double(), targets[scored]
        self.nll += nll.sum()
        self.targets += targets.sum()
        self.window_means += (nll / targets).sum()
        self.windows += len(targets)

    def compute(self) -> PerplexityValues:
        """Return both perplexities.

        Raises:
            RunError: no token was scored.
        """
        if not self.targets:
            raise RunError("perplexity: no token was scored; check that the evaluation text is not empty")
        return PerplexityValues(
            over_windows=(self.window_means / self.windows).exp(),
            over_tokens=(self.nll / self.targets).exp(),
            nll=self.nll.clone(),
        )

    def is_finite(self) -> bool:
        """Return whether all losses so far were finite."""
        return bool(torch.isfinite(self.nll))

    def check(self, name: str) -> None:
        """Raise ``RunError``, naming the text, if a loss was not finite."""
        if not self.is_finite():
            raise RunError(f"perplexity of {name}: the loss is not finite")
