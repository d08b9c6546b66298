"""Perplexity: cross-entropy window by window, and its two means."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from flapkit.system.errors import RunError
from flapkit.text.windows import UNSCORED

CHUNK_ELEMENTS = 2**24
"""Logits that are converted to float32 at once: 64 MiB."""


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of each window's scored tokens, each predicted from the logits one place before it.

    Args:
        logits: [windows, tokens, vocabulary], any floating dtype; converted to float32 piece by piece.
        labels: [windows, tokens]: the token itself where it is scored, else -100. The first is never scored.

    Returns:
        The sums in nats, float32 [windows], and how many tokens were scored, int64 [windows].
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
    """Perplexity by either mean of the cross-entropy; the two agree where all windows score as many tokens.

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

    A loss that is not finite makes both values infinite or NaN; ``is_finite`` tells so at once.
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
        """Take in windows; one that scores no token counts for nothing.

        Args:
            nll: each window's summed cross-entropy in nats [windows].
            targets: how many tokens each window scores [windows].
        """
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
            raise RunError("perplexity: no token was scored; the evaluation saw no text")
        return PerplexityValues(
            over_windows=(self.window_means / self.windows).exp(),
            over_tokens=(self.nll / self.targets).exp(),
            nll=self.nll.clone(),
        )

    def is_finite(self) -> bool:
        """Tell whether every loss that was taken in so far was finite."""
        return bool(torch.isfinite(self.nll))

    def check(self, name: str) -> None:
        """Raise ``RunError``, which names the text, if a loss that was taken in was not finite."""
        if not self.is_finite():
            raise RunError(f"perplexity of {name}: the loss is not finite")
