"""What runs models over text under Lightning: calibration, evaluation, and trainers for all else."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from flapkit.evaluation.batch_size import first_batch_size, halving
from flapkit.evaluation.perplexity import PerplexityValues
from flapkit.evaluation.protocol import EvaluationText, MeasuredPerplexity, bits_per_byte, perplexity
from flapkit.execution.lightning.callbacks import Calibrate, Evaluate, ProgressCallback
from flapkit.execution.lightning.data import PruningData
from flapkit.execution.lightning.module import CausalLM
from flapkit.execution.lightning.trainer import MODEL_PARALLEL, build_trainer, init_processes
from flapkit.model.site import Site
from flapkit.pruning.collector import Statistics, needs_gradient
from flapkit.pruning.statistics import Statistic
from flapkit.system.errors import RecipeError, RunError
from flapkit.system.processes import broadcast_from_rank0, check_started, lost_processes
from flapkit.system.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Runtime:
    """What Lightning's loops run on, and whom they tell how far they are; every stage builds its own trainer.

    Args:
        options: ``accelerator``, ``devices``, ``precision``, as Lightning takes them.
        progress: the run's.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    def check_processes(self) -> None:
        """Raise ``RecipeError`` where another number of processes was started than the options name."""
        check_started(self.processes)

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
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        statistics: Sequence[type[Statistic]],
        data: PruningData,
        *,
        stop_early: bool = False,
    ) -> Statistics:
        """Measure statistics of the dense model on calibration text.

        Args:
            model: the dense model.
            sites: where to measure.
            statistics: what to measure, as classes.
            data: the calibration text.
            stop_early: leave each forward pass after the last of the sites.

        Raises:
            CalibrationError: an input that is not finite.
            RunError: the loop was stopped before its end.
        """
        calibrate = Calibrate(sites, statistics, stop_early=stop_early)
        module = CausalLM(model, calibrate_gradient=needs_gradient(statistics))
        with self.progress.stage("calibrate", total=data.calibration_windows, unit="windows") as stage:
            trainer = self.trainer([calibrate, ProgressCallback(stage)])
            quietly(trainer.predict, module, data, return_predictions=False)
        if not calibrate.statistics:
            raise RunError("the run was stopped before the model was calibrated")
        return calibrate.statistics

    def evaluate(
        self, model: PreTrainedModel, texts: Mapping[str, EvaluationText], name: str = "evaluate"
    ) -> dict[str, MeasuredPerplexity]:
        """Measure the perplexity of each text.

        Args:
            model: dense or pruned.
            texts: name -> text.
            name: what the stage is called.

        Raises:
            RunError: a loss that is not finite, or a window that the device's memory does not hold.
        """

        def test(sizes: Mapping[str, int]) -> dict[str, PerplexityValues]:
            windows = {name: text.windows for name, text in texts.items()}
            data = PruningData(evaluations=windows, evaluation_batch_size=sizes)
            evaluate = Evaluate(data.evaluation_names)
            with self.progress.stage(name, sum(map(len, windows.values())), "windows") as stage:
                trainer = self.trainer([evaluate, ProgressCallback(stage)])
                quietly(trainer.test, CausalLM(model), data, verbose=False)
            return evaluate.results

        return self.measure_texts(model, texts, name, test)

    def measure_texts(
        self,
        model: PreTrainedModel,
        texts: Mapping[str, EvaluationText],
        name: str,
        test: Callable[[Mapping[str, int]], Mapping[str, PerplexityValues]],
    ) -> dict[str, MeasuredPerplexity]:
        """Measure the perplexity of each text with as many windows at once as it asks for, or as fit.

        Args:
            model: the model, for its sizes.
            texts: name -> text.
            name: what the stage is called.
            test: measures, given how many windows of each text go through the model at once.

        Raises:
            RunError: a window that the device's memory does not hold; of several processes, also a batch.
        """
        if not texts:
            return {}
        device = self.device
        sizes: Mapping[str, int] = {
            name: first_batch_size(model, text.protocol.length, device)
            if text.batch_size == "auto"
            else text.batch_size
            for name, text in texts.items()
        }
        # Where processes wait for each other in each forward pass, all have to take as many windows at once.
        sizes = broadcast_from_rank0(lambda: sizes)
        try:
            results, sizes = (test(sizes), sizes) if self.processes > 1 else halving(sizes, test)
        except torch.OutOfMemoryError as error:
            # One that began anew with smaller batches would be waited for by the others.
            wanted = ", ".join(map(str, sizes.values()))
            raise RunError(f"{name}: {wanted} windows at once do not fit; set `batch_size` in `evaluate`") from error
        return {
            text: MeasuredPerplexity(
                texts[text],
                perplexity(values, texts[text].protocol),
                bits_per_byte(values, texts[text].protocol),
                sizes[text],
            )
            for text, values in results.items()
        }


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
