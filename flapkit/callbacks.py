"""The stages of a run as Lightning callbacks, each thin over the functions of ``pruning.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from flapkit.api import prune_
from flapkit.calibration import Collector, Statistics
from flapkit.checkpoint import save
from flapkit.errors import RecipeError, RunError
from flapkit.evaluation import Perplexity
from flapkit.evaluation.perplexity import PerplexityValues
from flapkit.interfaces import Compensator, ImportanceMetric, StructureSearcher
from flapkit.plan import Budget, BudgetBase, PruningPlan
from flapkit.progress import Stage
from flapkit.pruning import Method, Pruned, prune_sites_
from flapkit.sequence import PrefixCollector
from flapkit.sites import Site
from flapkit.statistics import Statistic


def build_trainer(callbacks: Sequence[Callback], **options: Any) -> Trainer:
    """Build the trainer of a run: no logger, no checkpoints and no progress bar of Lightning's own.

    Args:
        callbacks: the stages.
        options: ``accelerator``, ``devices``, ``precision``, as Lightning takes them.

    Raises:
        RecipeError: a device that this machine does not have.
    """
    try:
        return Trainer(
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            # Parameters made under inference mode could never be trained.
            inference_mode=False,
            **options,
        )
    except (MisconfigurationException, RuntimeError) as error:
        raise RecipeError(f"trainer: {error}; choose an accelerator that is here, or `auto`") from error


class Advance(Callback):
    """Tell a stage of each batch that calibration or evaluation is done with.

    Args:
        stage: counts windows.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *where: Any
    ) -> None:
        """Count a calibration batch."""
        self._stage.advance(len(batch["input_ids"]))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *where: Any
    ) -> None:
        """Count an evaluation batch."""
        self._stage.advance(len(batch["input_ids"]))


class Calibrate(Callback):
    """Measure statistics while ``trainer.predict`` runs the calibration text through the backbone.

    Args:
        sites: where to measure.
        statistics: what to measure, as classes.
        stop_early: leave each forward pass after the last of the sites.

    Attributes:
        statistics: site name -> what was measured; merged over ranks at the end.
    """

    def __init__(
        self, sites: Sequence[Site], statistics: Sequence[type[Statistic]], *, stop_early: bool = False
    ) -> None:
        self._sites = sites
        self._classes = statistics
        self._stop_early = stop_early
        self._collector: Collector | None = None
        self.statistics: Statistics = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the consumers."""
        self._collector = self._collect(_model_of(pl_module))
        self._collector.__enter__()

    def _collect(self, model: PreTrainedModel) -> Collector:
        return Collector(model, self._sites, self._classes, stop_early=self._stop_early)

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


class CalibrateBehind(Calibrate):
    """Measure one site of a model whose earlier sites are pruned, which is the trainer's, against the dense model.

    Args:
        dense: the dense model, on the trainer's device.
        sites: all sites.
        site: where to measure.
        statistics: what to measure, as classes.
    """

    def __init__(
        self, dense: PreTrainedModel, sites: Sequence[Site], site: Site, statistics: Sequence[type[Statistic]]
    ) -> None:
        super().__init__([site], statistics)
        self._dense = dense
        self._all_sites = sites

    def _collect(self, model: PreTrainedModel) -> Collector:
        self._dense.to(model.device)  # type: ignore[arg-type]
        return PrefixCollector(self._dense, model, self._all_sites, self._sites[0], self._classes)


class Prune(Callback):
    """Score, search, correct and slice when calibration ends. Comes after ``Calibrate`` in the trainer's list.

    Args:
        calibrate: where the statistics come from.
        sites: the model's sites.
        method: the metric, the searcher and the compensators.
        budget: how much to remove.

    Attributes:
        pruned: the scores, and the plan that was carried out, once it was.
    """

    def __init__(self, calibrate: Calibrate, sites: Sequence[Site], method: Method, budget: Budget) -> None:
        self._calibrate = calibrate
        self._sites = sites
        self._method = method
        self._budget = budget
        self.pruned: Pruned | None = None

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune the model in place."""
        model, statistics = _model_of(pl_module), self._calibrate.statistics
        batches = trainer.predict_dataloaders or ()
        self.pruned = prune_sites_(model, self._sites, statistics, self._method, self._budget, batches)


class SaveCheckpoint(Callback):
    """Save the pruned model when a loop of the trainer ends. Comes after ``Prune`` in the trainer's list.

    Args:
        prune: where the plan comes from.
        path: the folder to write.
        after: the loop whose end it waits for: ``predict`` right after pruning, ``fit`` after a recovery.
        options: as ``flapkit.save`` takes them: ``tokenizer``, ``metadata``, ``files``, ``overwrite``.
    """

    def __init__(
        self, prune: Prune, path: Path | str, *, after: Literal["predict", "fit"] = "predict", **options: Any
    ) -> None:
        self._prune = prune
        self._path = path
        self._after = after
        self._options = options

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after pruning, if that was asked for."""
        if self._after == "predict":
            self._save(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after training, if that was asked for."""
        if self._after == "fit":
            self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._prune.pruned is None:
            raise RunError("SaveCheckpoint: the model is not pruned yet; put Prune before it in the trainer's list")
        if trainer.is_global_zero:
            save(_model_of(pl_module), self._path, self._prune.pruned.plan, **self._options)


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
