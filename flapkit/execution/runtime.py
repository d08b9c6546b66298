"""Run models over text with Lightning: calibration, evaluation, and trainers for everything else."""

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
from flapkit.model.spread import is_spread
from flapkit.pruning.collector import Statistics, needs_gradient
from flapkit.pruning.statistics import Statistic
from flapkit.system.errors import RecipeError, RunError
from flapkit.system.processes import broadcast_from_rank0, check_started, lost_processes
from flapkit.system.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Runtime:
    """The devices and precision of Lightning's loops, and their progress; every stage builds its own trainer.

    Args:
        options: ``accelerator``, ``devices``, ``precision`` and others, as in Lightning.
        progress: receives the progress of the stages.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def on(cls, device: torch.device) -> Runtime:
        """Return a runtime on one device, for a model outside a run."""
        return cls({"accelerator": "cpu", "devices": 1} if device.type == "cpu" else {"devices": [device.index or 0]})

    def check_processes(self) -> None:
        """Raise ``RecipeError`` if the number of started processes differs from the options."""
        check_started(self.processes)

    @cached_property
    def _resolved(self) -> Any:
        """A trainer that is never run: it holds the devices and the precision that Lightning chose."""
        return self.trainer([])

    @property
    def device(self) -> torch.device:
        """The device that the loops run on."""
        device: torch.device = self._resolved.strategy.root_device
        return device

    @property
    def processes(self) -> int:
        """How many processes share the windows, on all machines together."""
        # Not its world size, which under torchrun is the number of started processes.
        return int(self._resolved.num_devices * self._resolved.num_nodes)

    @property
    def per_machine(self) -> int:
        """How many of the processes share a machine."""
        return int(self._resolved.num_devices)

    @property
    def sharded(self) -> bool:
        """Whether every process holds only its share of the model's weights."""
        return self.options.get("strategy") == MODEL_PARALLEL

    @property
    def numerics(self) -> str:
        """What the results of a loop depend on beside the model: the type of device, and the precision."""
        return f"{self.device.type} {self._resolved.precision}"

    @property
    def precision(self) -> Callable[[], AbstractContextManager[Any]]:
        """Creates the context of a forward pass, such as autocast, for code outside a trainer's loop."""
        make: Callable[[], AbstractContextManager[Any]] = self._resolved.precision_plugin.forward_context
        return make

    def place_(self, model: PreTrainedModel) -> None:
        """Move a model to the device that the loops run on; one that is spread over several devices stays there."""
        if not is_spread(model):
            model.to(self.device)  # type: ignore[arg-type]

    def init_processes(self) -> None:
        """Initialise the process group; Lightning starts the processes unless a launcher did.

        Raises:
            RecipeError: the machines and devices differ from SLURM's allocation.
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
            callbacks: the work of the stage.
            options: additional Lightning options for this stage.

        Raises:
            RecipeError: this machine lacks the device.
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
            sites: the sites to measure.
            statistics: classes of the statistics.
            data: the calibration text.
            stop_early: end every forward pass after the last of the sites.

        Raises:
            CalibrationError: an input is not finite.
            RunError: the loop stopped before its end.
        """
        calibrate = Calibrate(sites, statistics, stop_early=stop_early)
        module = CausalLM(model, calibrate_gradient=needs_gradient(statistics))
        with self.progress.stage("calibrate", total=data.calibration_windows, unit="windows") as stage:
            trainer = self.trainer([calibrate, ProgressCallback(stage)])
            quietly(trainer.predict, module, data, return_predictions=False)
        if not calibrate.statistics:
            raise RunError("the run stopped before calibration was finished")
        return calibrate.statistics

    def evaluate(
        self, model: PreTrainedModel, texts: Mapping[str, EvaluationText], name: str = "evaluate"
    ) -> dict[str, MeasuredPerplexity]:
        """Measure the perplexity of each text.

        Args:
            model: dense or pruned.
            texts: name -> text.
            name: name of the stage.

        Raises:
            RunError: a loss is not finite, or a window does not fit in the device's memory.
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
        """Measure the perplexity of each text with its batch size, or the largest that fits.

        Args:
            model: the model, for its sizes.
            texts: name -> text.
            name: name of the stage.
            test: measures all texts, given the batch size of each.

        Raises:
            RunError: a window does not fit in the device's memory; with several processes, also if a batch does not.
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
        # Where processes wait for each other in every forward pass, all need the same batch size.
        sizes = broadcast_from_rank0(lambda: sizes)
        try:
            results, sizes = (test(sizes), sizes) if self.processes > 1 else halving(sizes, test)
        except torch.OutOfMemoryError as error:
            # With several processes there is no second attempt: the others would wait for the one that retries.
            tried = ", ".join(map(str, sizes.values()))
            raise RunError(
                f"{name}: out of memory with a batch size of {tried}; set a smaller `batch_size` in `evaluate`"
            ) from error
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
    """Call Lightning without its warnings about loader workers, samplers and others that do not apply here.

    Ctrl-C stays a ``KeyboardInterrupt``; Lightning would exit with code 1 and leave SIGINT ignored.
    """
    handler = signal.getsignal(signal.SIGINT)
    with lost_processes(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*treespec.*")
        warnings.filterwarnings("ignore", message="Using `DistributedSampler` with the dataloaders")
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        try:
            call(*args, **kwargs)
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, handler)
            raise error.__context__ from None
