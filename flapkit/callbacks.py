"""The stages of a run as Lightning callbacks, each thin over the functions of ``pruning.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from flapkit.api import prune_
from flapkit.calibration import Collector, Statistics
from flapkit.errors import RecipeError, RunError
from flapkit.evaluation import Perplexity
from flapkit.evaluation.perplexity import PerplexityValues
from flapkit.interfaces import Compensator, ImportanceMetric, StructureSearcher
from flapkit.plan import Budget, BudgetBase, PruningPlan
from flapkit.pruning import carry_out_, find_corrections, find_plan, score_sites
from flapkit.sites import Site
from flapkit.statistics import Statistic


def build_trainer(callbacks: Sequence[Callback], *, progress: bool = False, **options: Any) -> Trainer:
    """Build the trainer of a run: no logger and no checkpoints of Lightning's own.

    Args:
        callbacks: the stages.
        progress: show a progress bar.
        options: ``accelerator``, ``devices``, ``precision``, as Lightning takes them.

    Raises:
        RecipeError: a device that this machine does not have.
    """
    bars = [RichProgressBar()] if progress else []
    try:
        return Trainer(
            callbacks=[*callbacks, *bars],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
            # Parameters made under inference mode could never be trained.
            inference_mode=False,
            **options,
        )
    except (MisconfigurationException, RuntimeError) as error:
        raise RecipeError(f"trainer: {error}; choose an accelerator that is here, or `auto`") from error


class Calibrate(Callback):
    """Measure statistics while ``trainer.predict`` runs the calibration text through the backbone.

    Args:
        sites: where to measure.
        statistics: what to measure, as classes.

    Attributes:
        statistics: site name -> what was measured; merged over ranks at the end.
    """

    def __init__(self, sites: Sequence[Site], statistics: Sequence[type[Statistic]]) -> None:
        self._sites = sites
        self._classes = statistics
        self._collector: Collector | None = None
        self.statistics: Statistics = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the consumers."""
        self._collector = Collector(_model_of(pl_module), self._sites, self._classes).__enter__()

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take note of which tokens count."""
        if self._collector:
            self._collector.begin(batch)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop at the first input that is not finite."""
        if self._collector:
            self._collector.check()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge what the ranks measured."""
        if self._collector:
            for measured in self._collector.statistics.values():
                for statistic in measured.values():
                    statistic.sync()
            self.statistics = self._collector.statistics
        self._unhook()

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Leave no hook behind."""
        self._unhook()

    def _unhook(self) -> None:
        if self._collector:
            self._collector.__exit__(None, None, None)
            self._collector = None


class Prune(Callback):
    """Score, search, correct and slice when calibration ends. Comes after ``Calibrate`` in the trainer's list.

    Args:
        calibrate: where the statistics come from.
        sites: the model's sites.
        metric: scores the units.
        searcher: chooses the units to keep.
        compensators: repair the consumers.
        budget: how much to remove.

    Attributes:
        plan: the plan that was carried out.
    """

    def __init__(
        self,
        calibrate: Calibrate,
        sites: Sequence[Site],
        metric: ImportanceMetric,
        searcher: StructureSearcher,
        compensators: Sequence[Compensator],
        budget: Budget,
    ) -> None:
        self._calibrate = calibrate
        self._sites = sites
        self._metric = metric
        self._searcher = searcher
        self._compensators = compensators
        self._budget = budget
        self.plan: PruningPlan | None = None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune the model in place."""
        model, statistics = _model_of(pl_module), self._calibrate.statistics
        scores = score_sites(model, self._sites, statistics, self._metric)
        plan = find_plan(self._sites, scores, self._searcher, self._budget)
        carry_out_(model, self._sites, plan, find_corrections(model, self._sites, statistics, self._compensators, plan))
        self.plan = plan


class Evaluate(Callback):
    """Measure perplexity while ``trainer.test`` runs.

    Args:
        names: what the evaluation texts are called, in the order of the loaders.

    Attributes:
        results: name -> both perplexities of the last test.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._metrics: list[Perplexity] = []
        self.results: dict[str, PerplexityValues] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._metrics = [Perplexity().to(pl_module.device) for _ in self._names]

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in a batch, and stop where a loss is not finite."""
        metric = self._metrics[dataloader_idx]
        metric.update(outputs["nll"], outputs["targets"])
        if not metric.is_finite():
            raise RunError(f"perplexity of {self._names[dataloader_idx]}: the loss is not finite")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the ranks."""
        self.results = {name: metric.compute() for name, metric in zip(self._names, self._metrics, strict=True)}


class FlapPruning(Callback):
    """Prune a model before it is trained, in a script of your own: ``Trainer(callbacks=[FlapPruning(...)])``.

    Works in ``setup``, before the optimizer takes hold of the weights; the module keeps its transformers model in
    the attribute ``model``.

    Args:
        calibration: tokens [windows, tokens], or a dataset of mappings with ``input_ids``.
        ratio: fraction to remove.
        metric: a name, or a component.
        searcher: a name, or a component.
        compensator: a name, or a component; or several.
        of: what the ratio counts.

    Attributes:
        plan: the plan that was carried out, once it was.
    """

    def __init__(
        self,
        calibration: Tensor | Dataset[Any],
        ratio: float,
        metric: str | ImportanceMetric = "wifv",
        searcher: str | StructureSearcher = "al_am",
        compensator: str | Compensator | Sequence[str | Compensator] = "bias",
        of: BudgetBase = "blocks",
    ) -> None:
        self._calibration = calibration
        self._options: dict[str, Any] = {
            "ratio": ratio,
            "metric": metric,
            "searcher": searcher,
            "compensator": compensator,
            "of": of,
        }
        self.plan: PruningPlan | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prune once, on the device of the trainer."""
        if self.plan is None:
            pl_module.to(trainer.strategy.root_device)
            self.plan = prune_(_model_of(pl_module), self._calibration, **self._options)


def _model_of(module: LightningModule) -> PreTrainedModel:
    model = getattr(module, "model", None)
    if not isinstance(model, PreTrainedModel):
        raise RunError(f"{type(module).__name__} has no transformers model in its attribute `model`")
    return model
