"""Estimate what a run needs: memory, disk and compute, from the recipe and the model's configuration."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from flapkit.evaluation.batch_size import first_batch_size
from flapkit.evaluation.perplexity import CHUNK_ELEMENTS
from flapkit.execution.layerwise import LayerwiseExecutor
from flapkit.execution.lightning.data import held_out
from flapkit.execution.lightning.trainer import MODEL_PARALLEL
from flapkit.execution.needs import Needs, Workload
from flapkit.execution.runtime import Runtime
from flapkit.execution.whole import WholeExecutor
from flapkit.model.budget import Budget
from flapkit.model.empty import build_empty
from flapkit.model.site import Site
from flapkit.pruning.collector import needs_gradient
from flapkit.pruning.components import TrainedSearcher, TrialSearcher, recovery_of
from flapkit.pruning.recovery import Training
from flapkit.pruning.site_errors import trace_tokens, traced
from flapkit.pruning.statistics import size_of
from flapkit.recipe.load import LoadedRecipe
from flapkit.recipe.schema import Perplexity, Recipe
from flapkit.run.budget import open_budget
from flapkit.run.dtypes import DTypes, choose_dtypes
from flapkit.run.executors import open_runtime
from flapkit.run.target import Target
from flapkit.system.errors import ModelError, RecipeError
from flapkit.text.named import Purpose
from flapkit.text.source import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENISED = {"calibration": 20, "evaluation": 60}
"""Bytes of memory for each byte of text while it is read and tokenised, as measured with 9 MB of it and 2 tokenizers;
an evaluation also counts the bytes of each token."""

WINDOWS = {"calibration": 8, "evaluation": 24}
"""Bytes of each token of a window: the token, and with it what is attended to and what is scored."""

TEXT = 100_000_000
"""Bytes in use after reading and tokenising text, measured with 9 MB of it."""

CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Linux's files with the memory limit of a container, of cgroup version 2 and 1."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run needs. Memory is the resident peak of a process, in bytes.

    Args:
        weights: bytes of the dense weights.
        mapped: the part of them that the processes of a machine share, as pages of the checkpoint's files.
        own: memory of Python, the libraries and the windows of all texts.
        whole: memory with the whole model, including ``own``.
        least: the part of ``whole`` that cannot be reclaimed: the system can drop pages of the dense weights' file.
        layerwise: memory with one decoder layer at a time; None if the model has no list of layers.
        sharded: memory of each process with its part of the weights (``strategy: model_parallel``); None as above.
        device: bytes on a GPU with the whole model, or with its part if the recipe shards it.
        disk: the most bytes written: weights, and hidden states of all processes if they are on the disk.
        flops: floating-point operations of calibration; a multiply-accumulate counts as two.
        search_flops: those of a search by trials or by training, at most; None if unknown.
        passes: how often the calibration text runs through the model.
        trained: parameters that a recovery trains; None without one.
        unread: datasets whose text is not on this machine, so that its memory is not included.
    """

    weights: int
    mapped: int
    own: int
    whole: int
    least: int
    layerwise: int | None
    sharded: int | None
    device: int
    disk: int
    flops: int
    search_flops: int | None
    passes: int
    trained: int | None = None
    unread: tuple[str, ...] = ()


def empty_model(target: Target, dtypes: DTypes) -> PreTrainedModel:
    """Build a recipe's dense model on the meta device, in the dtype in which it will run.

    Raises:
        ModelError: transformers cannot build it.
    """
    empty = build_empty(target.config)
    empty.to(dtypes.compute)  # type: ignore[arg-type]
    return empty


def estimate_needs(
    recipe: LoadedRecipe,
    target: Target,
    empty: PreTrainedModel,
    budget: Budget,
    dtypes: DTypes,
    processes: int = 1,
) -> Estimate:
    """Estimate what a run needs on a CPU, and on a GPU if there is one.

    Args:
        recipe: the recipe.
        target: the model's sites.
        empty: the dense model on the meta device, in the dtype in which it will run.
        budget: how much to remove.
        dtypes: the dtypes of the computation and of the written checkpoint.
        processes: how many processes share the windows.
    """
    settings, size = recipe.recipe, empty.dtype.itemsize
    texts = _texts(recipe, processes)
    own = psutil.Process().memory_info().rss + TEXT + sum(WINDOWS[text.purpose] * text.tokens for text in texts)
    # Text is read before the model.
    reading = own + max((TOKENISED[text.purpose] * text.size for text in texts), default=0)
    batch = max(_calibration_batch(recipe, target, size), _evaluation_batch(recipe, empty))
    batch = max(batch, _gates_memory(recipe, target, size))
    workload = Workload(
        empty,
        target.sites,
        recipe.method,
        budget.params,
        _tokens_together(settings),
        settings.calibration.statistics_bytes,
        sequential=settings.calibration.sequential,
        hidden_on_disk=settings.execution.hidden_states == "disk",
        working=_trace_memory(recipe, target, size) + batch,
        processes=processes,
        saved=dtypes.saved,
    )
    weights, left = workload.weights, workload.pruned_weights
    whole, layers = WholeExecutor.needs(workload), _layerwise_needs(workload)
    held, least = max(own + whole.memory, reading), max(own + whole.least, reading + weights - weights // processes)
    layerwise, sharded = None, None
    gathered, on_device = 0, weights
    if layers is not None:
        outer, largest = workload.layers
        # A process of a sharded model holds its part of every weight, the weights outside the layers, and two layers.
        gathered = outer + 2 * largest
        layerwise = max(own + layers.memory, reading)
        sharded = max(own + weights // processes + gathered + batch, reading)
        if settings.trainer.strategy == MODEL_PARALLEL:
            on_device = weights // processes + gathered
    disk, trained = ((layers or whole) if settings.execution.mode == "layerwise" else whole).disk, None
    if (recovery := recovery_of(recipe.compensators)) is not None:
        recovery.attach(empty, target.sites)
        trained = sum(parameter.numel() for parameter in empty.parameters() if parameter.requires_grad)
        teacher = weights if recovery.training.distill else 0
        beside = _training_memory(recovery.training, target, size, trained)
        training = own + left + teacher + beside
        held, least, disk = max(held, training), max(least, training), disk + left
        layerwise = layerwise and max(layerwise, training)
        sharded = sharded and max(sharded, own + (left + teacher) // processes + gathered + beside)
    return Estimate(
        weights=weights,
        mapped=weights if dtypes.compute == dtypes.stored else 0,
        own=own,
        whole=held,
        least=least,
        layerwise=layerwise,
        sharded=sharded,
        device=on_device + workload.statistics + batch,
        disk=disk,
        flops=workload.passes * calibration_flops(recipe, target),
        search_flops=search_flops(recipe, target, budget, processes),
        passes=workload.passes,
        trained=trained,
        unread=tuple(dict.fromkeys(dataset for text in texts for dataset in text.unread)),
    )


@dataclass(frozen=True, slots=True)
class _Text:
    """A text of a recipe: what is read of it, and what is kept.

    Args:
        purpose: what it is read for.
        size: bytes of text, as far as they are known; the sources of a mix are read before windows are drawn.
        tokens: tokens of its windows.
        unread: the datasets whose size is not known.
    """

    purpose: Purpose
    size: int
    tokens: int
    unread: tuple[str, ...] = ()

    @classmethod
    def of(cls, sources: Sequence[TextSource], purpose: Purpose, tokens: int) -> _Text:
        """Look at the text of some sources."""
        sizes = [(source.dataset, source.size(purpose)) for source in sources]
        unread = tuple(dataset for dataset, size in sizes if size is None)
        return cls(purpose, sum(size or 0 for _, size in sizes), tokens, unread)


def _texts(recipe: LoadedRecipe, processes: int) -> list[_Text]:
    """List the texts of a recipe."""
    settings = recipe.recipe
    calibration = settings.calibration
    texts = [_Text.of(calibration.text.sources, "calibration", calibration.samples * calibration.length)]
    for text in settings.evaluate.perplexity:
        read = _Text.of([text], "evaluation", 0)
        # A token has two bytes or more, in most languages.
        most = read.size // 2
        cut = most * text.length // (text.stride or text.length)
        tokens = cut if text.windows is None else text.windows * text.length
        texts.append(replace(read, tokens=tokens))
    if (recovery := recovery_of(recipe.compensators)) is not None:
        training = recovery.training
        steps = training.steps * training.batch_size * settings.trainer.accumulate_grad_batches * processes
        tokens = (steps + training.validation_windows) * training.length
        texts.append(_Text.of(training.source(calibration.text).sources, "calibration", tokens))
    return texts


def _layerwise_needs(workload: Workload) -> Needs | None:
    """Return the needs of one layer at a time; None if the model has no list of layers."""
    try:
        return LayerwiseExecutor.needs(workload)
    except ModelError:
        return None


def _tokens_together(settings: Recipe) -> int:
    """Return how many tokens go through the layers together: those of calibration, or of evaluation."""
    evaluated = sum((text.windows or 0) * text.length for text in settings.evaluate.perplexity)
    return max(settings.calibration.samples * settings.calibration.length, evaluated)


def refuse_too_large(recipe: LoadedRecipe, target: Target) -> None:
    """Estimate a run's needs, and raise ``RecipeError`` if it does not fit (``check_fits``)."""
    settings, runtime = recipe.recipe, open_runtime(recipe.recipe.trainer)
    dtypes = choose_dtypes(settings.model, target.config, runtime.device)
    empty = empty_model(target, dtypes)
    budget = open_budget(recipe, target, empty.num_parameters(), dtypes.saved).budget
    check_fits(recipe, estimate_needs(recipe, target, empty, budget, dtypes, runtime.processes), runtime)


def check_fits(recipe: LoadedRecipe, needs: Estimate, runtime: Runtime) -> None:
    """Raise ``RecipeError`` if a run needs more memory than the machine has.

    Args:
        recipe: the recipe.
        needs: what each process needs.
        runtime: what it runs on.
    """
    layerwise, device, processes = recipe.recipe.execution.mode == "layerwise", runtime.device, runtime.per_machine
    # Processes map the same pages of the dense weights' file.
    needed, limit = needs.least - needs.mapped + needs.mapped // processes, memory_limit(processes)
    where = ""
    if layerwise:
        needed = needs.layerwise or 0
    elif runtime.sharded and device.type != "cuda":
        needed = needs.sharded or 0
    elif device.type == "cuda":
        needed, limit, where = needs.device, _device_memory(device), " on the GPU"
        if recipe.recipe.model.device_map is not None:
            # accelerate spreads the weights; what does not fit is known, and refused, when they are loaded.
            devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
            limit, where = sum(map(_device_memory, devices)), " on the GPUs"
    if needed <= limit:
        return
    shared = f" in each of {processes} processes" if processes > 1 else ""
    way = "" if layerwise or not needs.layerwise else f"`execution: layerwise` needs {_gigabytes(needs.layerwise)}; "
    raise RecipeError(
        f"{recipe.path}: the run needs about {_gigabytes(needed)} of memory{where}{shared}; {_gigabytes(limit)} "
        f"available{' to each' if shared else ''}; {way}--force runs it anyway"
    )


def _device_memory(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


def memory_limit(processes: int = 1) -> int:
    """Return the bytes of memory available to a process: its share of the machine's or container's, or its own limit.

    Args:
        processes: how many processes share the machine.
    """
    limits = [psutil.virtual_memory().total // processes]
    limits += [int(text) // processes for text in map(_read, CGROUPS) if text.isdigit()]
    soft = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    limits += [limit for limit in soft if limit != resource.RLIM_INFINITY]
    return int(min(limits))


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def calibration_flops(recipe: LoadedRecipe, target: Target) -> int:
    """Return the floating-point operations of one pass of the calibration text through the blocks.

    Every weight is multiplied and added once per token; attention multiplies each token of a window with every other,
    for scores and for values. A backward pass costs twice as much in addition.
    """
    text = recipe.recipe.calibration
    forward = text.samples * _window_flops(target, text.length)
    return int(forward * (3 if needs_gradient(recipe.method.statistics) else 1))


def search_flops(recipe: LoadedRecipe, target: Target, budget: Budget, processes: int = 1) -> int | None:
    """Return the floating-point operations of a search, at most: its passes through the model, with the predictions.

    What trials cost beside them (corrections, which are kept), and what a training computes between its steps, is left
    out. The weights are frozen, so that a backward pass costs as much as a forward pass.

    Args:
        recipe: the recipe.
        target: the model's sites.
        budget: how much to remove.
        processes: how many processes share the windows of a training; each of them runs all trials.

    Returns:
        0 for a searcher that ranks, None for one that does not say how many trials it makes.
    """
    searcher, text, config = recipe.searcher, recipe.recipe.calibration, target.config.get_text_config()
    head = 2 * text.length * int(config.hidden_size) * int(config.vocab_size)
    dense, judging = _window_flops(target, text.length) + head, int(held_out(text.samples).sum())
    if isinstance(searcher, TrialSearcher) and budget.amount:
        passes = searcher.expected_passes
        pruned = dense - 2 * text.length * budget.params
        return None if passes is None else int(processes * judging * (dense + passes * pruned))
    if isinstance(searcher, TrainedSearcher) and budget.amount:
        training = searcher.training
        gated = dense + 2 * text.length * sum(map(searcher.operations, target.sites))
        trained = training.steps * training.batch_size * recipe.recipe.trainer.accumulate_grad_batches * processes
        validations = 1 + math.ceil(training.steps / training.validate_every)
        validated = validations * min(training.validation_windows, judging)
        return int(trained * (dense + 2 * gated) + validated * (dense + gated))
    return 0


def _window_flops(target: Target, length: int) -> float:
    """Return the floating-point operations of one window's forward pass through the blocks."""
    weights = sum(site.params * _routed(site, target) for site in target.sites)
    attention = sum(2 * length * site.channels for site in target.sites if site.kind == "attention")
    return 2 * length * (weights + attention)


def _routed(site: Site, target: Target) -> float:
    """Return the fraction of the tokens that reach a site: 1 except for experts; of a mixture, that of its experts."""
    if not site.stacked:
        return 1.0
    experts = sum(other.layer == site.layer and other.expert is not None for other in target.sites) or site.units
    return float(getattr(target.config.get_text_config(), "num_experts_per_tok", experts) / experts)


def _calibration_batch(recipe: LoadedRecipe, target: Target, size: int) -> int:
    """Return the bytes of a calibration batch's activations."""
    text, widest = recipe.recipe.calibration, max(site.channels for site in target.sites)
    hidden = int(target.config.get_text_config().hidden_size)
    # A layer's inputs and outputs, and the MLP's three products; the statistics' float64 copy of an input.
    return text.batch_size * text.length * (size * (4 * hidden + 3 * widest) + 8 * 2 * widest)


def _evaluation_batch(recipe: LoadedRecipe, empty: PreTrainedModel) -> int:
    """Return the bytes of an evaluation batch's logits, and of one chunk of their cross-entropy."""
    size, vocabulary = empty.dtype.itemsize, int(empty.config.get_text_config().vocab_size)

    def bytes_of(text: Perplexity) -> int:
        size_of_batch = text.batch_size
        if size_of_batch == "auto":
            size_of_batch = first_batch_size(empty, text.length, torch.device("cpu"))
        logits = min(size_of_batch, text.windows or size_of_batch) * text.length * vocabulary
        return logits * size + min(logits, CHUNK_ELEMENTS) * (8 if size == 4 else 8 + size)

    return max(map(bytes_of, recipe.recipe.evaluate.perplexity), default=0)


def _trace_memory(recipe: LoadedRecipe, target: Target, size: int) -> int:
    """Return the bytes of the traces for the site errors, of the dense and of the pruned model."""
    settings = recipe.recipe
    windows = min(settings.report.error_windows, int(held_out(settings.calibration.samples).sum()))
    tokens = trace_tokens(target.sites, windows, settings.calibration.length, size)
    return 2 * tokens * sum(size * site.channels + 4 * site.out_features for site in traced(target.sites))


def _gates_memory(recipe: LoadedRecipe, target: Target, size: int) -> int:
    """Return the bytes that a searcher that trains gates needs beside the weights and its statistics; 0 for others."""
    searcher = recipe.method.searcher
    if not isinstance(searcher, TrainedSearcher):
        return 0
    # The dense model's predictions are learned; what the statistics give takes about as much as they do.
    training = replace(searcher.training, length=recipe.recipe.calibration.length, distill=True)
    units = sum(site.units for site in target.sites)
    return _training_memory(training, target, size, units) + size_of(searcher.measures(), target.sites)


def _training_memory(training: Training, target: Target, size: int, trained: int) -> int:
    """Return the bytes that a recovery needs beside the weights."""
    tokens, config = training.batch_size * training.length, target.config.get_text_config()
    # The backward pass needs of each block: its input and its norm's, and about four tensors of its width.
    activations: int = sum(6 * config.hidden_size + 4 * site.channels for site in target.sites)
    # Logits, their float32 copy and its gradient; the teacher's logits, and both log-softmaxes.
    copies: int = size + 8 + (size + 12 if training.distill else 0)
    # Weights, gradients, AdamW's two moments, and the best step.
    return 20 * trained + tokens * (size * activations + copies * int(config.vocab_size))
