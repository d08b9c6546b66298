"""Log the figures of a run as its stages finish."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flapkit.evaluation.protocol import MeasuredPerplexity
from flapkit.execution.lightning.loggers import LoggerName, build_loggers
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, by_layer
from flapkit.pruning.site_errors import SiteError
from flapkit.recipe.schema import Recipe
from flapkit.run.report.view import short
from flapkit.system.paths import names_only

FOLDER = "pruning"
"""Folder below ``logs``; a recovery's training writes beside it."""


class RunLog:
    """A run's loggers.

    Args:
        loggers: Lightning's loggers.
        folder: folder of the loggers that write files.
    """

    def __init__(self, loggers: Sequence[Any], folder: Path) -> None:
        self._loggers = loggers
        self._folder = folder

    def perplexity(self, which: str, measured: Mapping[str, MeasuredPerplexity]) -> None:
        """Log the perplexity of every text.

        Args:
            which: ``dense`` or ``pruned``.
            measured: name of the text -> its perplexity.
        """
        self._log({f"perplexity/{_name(text)}/{which}": value.perplexity for text, value in measured.items()})

    def structure(self, sites: Sequence[Site], plan: PruningPlan) -> None:
        """Log the fraction of units kept in each layer; the step is the layer."""
        for layer, of_layer in by_layer(sites).items():
            kinds = {site.kind for site in of_layer}
            self._log({f"kept/{kind}": _fraction(of_layer, kind, plan) for kind in kinds}, layer)

    def errors(self, sites: Sequence[Site], errors: Mapping[str, SiteError]) -> None:
        """Log the error of each site with the dense input; the step is the layer."""
        for site in sites:
            if site.name in errors:
                name = site.kind if site.expert is None else f"expert {site.expert}"
                self._log({f"error/{name}": errors[site.name].alone}, site.layer)

    def totals(self, params: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        """Log parameters and times at the end."""
        self._log({f"parameters/{name}": float(value) for name, value in params.items()})
        self._log({f"seconds/{name}": value for name, value in seconds.items()})

    def files(self) -> dict[str, bytes]:
        """Return the files written so far, path -> content."""
        for logger in self._loggers:
            logger.save()
        paths = sorted(path for path in (self._folder / "logs").rglob("*") if path.is_file())
        return {path.relative_to(self._folder).as_posix(): path.read_bytes() for path in paths}

    def _log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        for logger in self._loggers:
            logger.log_metrics(dict(metrics), step)


@contextmanager
def open_log(names: Sequence[LoggerName], recipe: Recipe) -> Iterator[RunLog]:
    """Open a run's loggers, and close them when the run ends, also when it fails.

    Args:
        names: names of the loggers.
        recipe: the resolved recipe, logged as hyperparameters.

    Raises:
        RecipeError: a logger's package is not installed.
    """
    # In a temporary folder: the output folder appears when it is complete, logs included.
    with tempfile.TemporaryDirectory(prefix="flapkit-logs-") as folder:
        loggers = build_loggers(names, Path(folder), FOLDER)
        for logger in loggers:
            logger.log_hyperparams(names_only(recipe.model_dump(mode="json")))
        status = "failed"
        try:
            yield RunLog(loggers, Path(folder))
            status = "success"
        finally:
            for logger in loggers:
                logger.finalize(status)


def _fraction(sites: Sequence[Site], kind: str, plan: PruningPlan) -> float:
    of_kind = [site for site in sites if site.kind == kind]
    return sum(len(plan.keep[site.name]) for site in of_kind) / sum(site.units for site in of_kind)


def _name(text: str) -> str:
    """Return a text's name with characters that every logger accepts."""
    return re.sub(r"[^\w.\- ]", "_", short(text))
