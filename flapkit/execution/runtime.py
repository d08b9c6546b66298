"""The stages that run a model over text, under Lightning: calibration and evaluation."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from flapkit.evaluation.batch_size import first_batch_size, halving
from flapkit.evaluation.perplexity import PerplexityValues
from flapkit.evaluation.protocol import bits_per_byte, perplexity
from flapkit.execution.lightning.callbacks import Calibrate, CalibrateBehind, Evaluate, ProgressCallback
from flapkit.execution.lightning.data import PruningData
from flapkit.execution.lightning.module import CausalLM
from flapkit.execution.lightning.trainer import MODEL_PARALLEL, build_trainer, init_processes
from flapkit.execution.resume import ResumeStore
from flapkit.model.site import Site
from flapkit.pruning.collector import Statistics, needs_gradient
from flapkit.pruning.statistics import SiteStatistics, Statistic
from flapkit.recipe import TrainerSection
from flapkit.run.text import EvaluationText, RunText
from flapkit.system.errors import RecipeError, RunError
from flapkit.system.processes import broadcast_from_rank0, check_started, lost_processes
from flapkit.system.progress import Progress


@dataclass(frozen=True)
class Runtime:
    """What Lightning's loops run on, and whom they tell how far they are; every stage builds its own trainer.

    Args:
        options: ``accelerator``, ``devices``, ``precision``, as Lightning takes them.
        progress: the run's.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def of(cls, asked: TrainerSection, progress: Progress) -> Runtime:
        """Take over what a recipe says; what it leaves open is Lightning's to choose.

        Raises:
            RecipeError: a device that this machine does not have, or another number of processes than were started.
        """
        options = asked.model_dump(exclude={"logger"})
        runtime = cls({name: value for name, value in options.items() if value is not None}, progress)
        check_started(runtime.processes)
        return runtime

    @cached_property
    def _asked(self) -> Any:
        """A trainer that is asked what Lightning chose, and never run."""
        return self.trainer([])

    @property
    def device(self) -> torch.device:
        """The device that the loops run on."""
        device: torch.device = self._asked.strategy.root_device
        return device

    @property
    def processes(self) -> int:
        """How many processes share the windows, on all machines together."""
        # Not its world size, which under torchrun is what was started.
        return int(self._asked.num_devices * self._asked.num_nodes)

    @property
    def per_machine(self) -> int:
        """How many of the processes share a machine."""
        return int(self._asked.num_devices)

    @property
    def sharded(self) -> bool:
        """Whether each process holds its share of the model's weights, and no more."""
        return self.options.get("strategy") == MODEL_PARALLEL

    @property
    def numerics(self) -> str:
        """What the numbers of a loop depend on beside the model: the kind of device, and the precision."""
        return f"{self.device.type} {self._asked.precision}"

    @property
    def precision(self) -> Callable[[], AbstractContextManager[Any]]:
        """Makes the context of a forward pass, such as autocast, for what runs outside a trainer's loop."""
        make: Callable[[], AbstractContextManager[Any]] = self._asked.precision_plugin.forward_context
        return make

    def place_(self, model: PreTrainedModel) -> None:
        """Move a model to the device that the loops run on."""
        model.to(self.device)  # type: ignore[arg-type]

    def init_processes(self) -> None:
        """Wait until all processes of the run know of each other; Lightning starts them where nothing else did.

        Raises:
            RecipeError: the machines and devices are not those that SLURM gave.
        """
        if self.processes == 1 and not self.sharded:
            return
        trainer = self.trainer([])
        try:
            quietly(init_processes, trainer)
        except ValueError as error:
            raise RecipeError(f"trainer: {error}") from error

    def trainer(self, callbacks: Sequence[Any], **options: Any) -> Any:
        """Build the trainer of one stage.

        Args:
            callbacks: what it does.
            options: more options of Lightning's, for this stage.

        Raises:
            RecipeError: a device that this machine does not have.
        """
        return build_trainer(callbacks, **{**self.options, **options})


def calibrate(
    model: PreTrainedModel,
    sites: Sequence[Site],
    statistics: Sequence[type[Statistic]],
    text: RunText,
    runtime: Runtime,
    kept: ResumeStore | None = None,
    *,
    stop_early: bool = False,
) -> Statistics:
    """Measure statistics of the dense model on the calibration text; without any to measure, nothing is run.

    Args:
        model: the dense model.
        sites: where to measure.
        statistics: what to measure, as classes.
        text: the calibration text.
        runtime: what it runs on.
        kept: where the statistics so far are saved, and those of a stopped run are gone on with; None for nowhere.
        stop_early: leave each forward pass after the last of the sites.

    Raises:
        CalibrationError: an input that is not finite.
        RunError: the loop was stopped before its end.
    """
    if not statistics:
        return {site.name: SiteStatistics([]) for site in sites}
    states = kept.states(_name_of("dense", sites, statistics)) if kept else None
    measured = Calibrate(sites, statistics, stop_early=stop_early, states=states)
    return _measure(measured, model, statistics, text, runtime)


def _name_of(model: str, sites: Sequence[Site], statistics: Sequence[type[Statistic]]) -> str:
    names = (f"{each.__module__}.{each.__qualname__}" for each in statistics)
    return f"{' '.join(names)} of the {model} model at {' '.join(site.name for site in sites)}"


def calibrate_behind(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    sites: Sequence[Site],
    site: Site,
    statistics: Sequence[type[Statistic]],
    text: RunText,
    runtime: Runtime,
    kept: ResumeStore | None = None,
) -> Statistics:
    """Measure statistics at one site of a model whose earlier sites are pruned; see ``flapkit.pruning.sequential``."""
    states = kept.states(_name_of("pruned", [site], statistics)) if kept else None
    return _measure(CalibrateBehind(dense, sites, site, statistics, states), pruned, statistics, text, runtime)


def _measure(
    measured: Calibrate, model: PreTrainedModel, statistics: Sequence[type[Statistic]], text: RunText, runtime: Runtime
) -> Statistics:
    module = CausalLM(model, calibrate_gradient=needs_gradient(statistics))
    data = calibration_data(text)
    with runtime.progress.stage("calibrate", total=len(text.calibration), unit="windows") as stage:
        quietly(runtime.trainer([measured, ProgressCallback(stage)]).predict, module, data, return_predictions=False)
    if not measured.statistics:
        raise RunError("the run was stopped before the model was calibrated")
    return measured.statistics


def calibration_data(text: RunText, share: Mapping[str, int] | None = None) -> PruningData:
    """Return the calibration text as Lightning loads it; ``share`` as of ``PruningData``."""
    return PruningData(text.calibration, batch_size=text.batch_size, share=share)


@dataclass(frozen=True, slots=True)
class Measured:
    """A model's perplexity of one text.

    Args:
        text: the text, and how it was measured.
        perplexity: by the mean that the text's protocol names.
        bits_per_byte: cross-entropy for each byte of scored text; None where the tokenizer does not say which bytes.
        batch_size: windows that went through the model at once.
    """

    text: EvaluationText
    perplexity: float
    bits_per_byte: float | None
    batch_size: int


def evaluate(
    model: PreTrainedModel, texts: Mapping[str, EvaluationText], runtime: Runtime, name: str = "evaluate"
) -> dict[str, Measured]:
    """Measure the perplexity of each text, by the protocol that its recipe entry asks for.

    Args:
        model: dense or pruned.
        texts: name -> text.
        runtime: what it runs on.
        name: what the stage is called.

    Raises:
        RunError: a loss that is not finite, or a window that the device's memory does not hold.
    """
    return measure_texts(model, texts, runtime, name, lambda sizes: _test(model, texts, sizes, runtime, name))


def measure_texts(
    model: PreTrainedModel,
    texts: Mapping[str, EvaluationText],
    runtime: Runtime,
    name: str,
    test: Callable[[Mapping[str, int]], Mapping[str, PerplexityValues]],
) -> dict[str, Measured]:
    """Measure the perplexity of each text with as many windows at once as it asks for, or as fit.

    Args:
        model: the model, for its sizes.
        texts: name -> text.
        runtime: what it runs on.
        name: what the stage is called.
        test: measures, given how many windows of each text go through the model at once.

    Raises:
        RunError: a window that the device's memory does not hold; of several processes, also a batch.
    """
    if not texts:
        return {}
    device = runtime.device
    sizes: Mapping[str, int] = {
        name: first_batch_size(model, text.asked.length, device)
        if text.asked.batch_size == "auto"
        else text.asked.batch_size
        for name, text in texts.items()
    }
    # Where processes wait for each other in each forward pass, all have to take as many windows at once.
    sizes = broadcast_from_rank0(lambda: sizes)
    try:
        results, sizes = (test(sizes), sizes) if runtime.processes > 1 else halving(sizes, test)
    except torch.OutOfMemoryError as error:
        # One that began anew with smaller batches would be waited for by the others.
        wanted = ", ".join(map(str, sizes.values()))
        raise RunError(f"{name}: {wanted} windows at once do not fit; set `batch_size` in `evaluate`") from error
    return {
        text: Measured(
            texts[text],
            perplexity(values, texts[text].protocol),
            bits_per_byte(values, texts[text].protocol),
            sizes[text],
        )
        for text, values in results.items()
    }


def _test(
    model: PreTrainedModel, texts: Mapping[str, EvaluationText], sizes: Mapping[str, int], runtime: Runtime, name: str
) -> dict[str, PerplexityValues]:
    data = PruningData(evaluations={name: text.windows for name, text in texts.items()}, evaluation_batch_size=sizes)
    measured = Evaluate(data.evaluation_names)
    total = sum(len(text.windows) for text in texts.values())
    with runtime.progress.stage(name, total, "windows") as stage:
        quietly(runtime.trainer([measured, ProgressCallback(stage)]).test, CausalLM(model), data, verbose=False)
    return measured.results


def quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call Lightning without its advice on loader workers, which windows in memory do not need, and on ranks.

    Ctrl-C stays a ``KeyboardInterrupt``: Lightning would exit with code 1 and leave SIGINT ignored.
    """
    handler = signal.getsignal(signal.SIGINT)
    with lost_processes(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*treespec.*")
        warnings.filterwarnings("ignore", message="Using `DistributedSampler` with the dataloaders")
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        try:
            call(*args, **kwargs)
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, handler)
            raise error.__context__ from None
