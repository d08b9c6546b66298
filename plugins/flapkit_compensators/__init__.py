"""flapkit's own compensators."""

from __future__ import annotations

from collections.abc import Iterable

from flapkit import hookimpl
from flapkit.interfaces import Compensator
from flapkit_compensators.bias import Bias
from flapkit_compensators.least_squares import LeastSquares
from flapkit_compensators.lora import Lora
from flapkit_compensators.none import NoCompensation
from flapkit_compensators.procrustes import Procrustes


@hookimpl
def flapkit_compensators() -> Iterable[type[Compensator]]:
    """Offer the default compensators."""
    return [Bias, LeastSquares, Lora, NoCompensation, Procrustes]
