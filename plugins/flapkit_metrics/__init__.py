"""flapkit's own importance metrics."""

from __future__ import annotations

from collections.abc import Iterable

from flapkit import hookimpl
from flapkit.interfaces import ImportanceMetric
from flapkit_metrics.angular import Angular
from flapkit_metrics.frequency import Frequency
from flapkit_metrics.ifv import IFV
from flapkit_metrics.kfac import KFAC
from flapkit_metrics.magnitude import Magnitude
from flapkit_metrics.obs import OBS
from flapkit_metrics.random import Random
from flapkit_metrics.reap import REAP
from flapkit_metrics.taylor import Taylor
from flapkit_metrics.trace import Trace
from flapkit_metrics.wanda_sp import WandaSP
from flapkit_metrics.wifn import WIFN
from flapkit_metrics.wifv import WIFV


@hookimpl
def flapkit_metrics() -> Iterable[type[ImportanceMetric]]:
    """Offer the default metrics."""
    return [Angular, IFV, KFAC, OBS, REAP, WIFN, WIFV, Frequency, Magnitude, Random, Taylor, Trace, WandaSP]
