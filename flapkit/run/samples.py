"""The stages for a run's report: the error of each site, and samples of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from flapkit.evaluation.samples import write_samples
from flapkit.execution.executor import Executor
from flapkit.execution.lightning.data import held_out
from flapkit.execution.runtime import Runtime
from flapkit.model.site import Site
from flapkit.pruning.algorithm import Pruned
from flapkit.pruning.site_errors import SiteError, Trace, traced
from flapkit.recipe.schema import Message, ReportSection, Samples
from flapkit.run.report.report_record import SampleRecord
from flapkit.run.text import RunText
from flapkit.system.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def make_trace(sites: Sequence[Site], text: RunText, settings: ReportSection, dtype: torch.dtype) -> Trace | None:
    """Create the trace that measures the error of every site, on held-out calibration windows.

    Returns:
        An empty trace; None if the recipe turns it off, or no calibration window is held out.
    """
    chosen = held_out(len(text.calibration)).nonzero()[: settings.error_windows, 0]
    windows = text.calibration[chosen]
    return Trace(sites, windows, dtype, text.batch_size) if len(windows) else None


def trace_dense(executor: Executor, trace: Trace | None, progress: Progress) -> None:
    """Store the inputs and outputs of the dense model's consumers."""
    if trace is None:
        return
    with progress.stage("trace dense"):
        for measured in executor.observe(traced(executor.sites), trace.statistic, trace.batches):
            trace.see(executor.model, measured)


def compare_pruned(
    executor: Executor, trace: Trace | None, pruned: Pruned, progress: Progress
) -> Mapping[str, SiteError]:
    """Measure the error of each pruned site's output."""
    errors: dict[str, SiteError] = {}
    if trace is None:
        return errors
    with progress.stage("site errors"):
        sites = trace.pruned_sites(pruned.plan, executor.sites)
        for measured in executor.observe(sites, trace.statistic, trace.batches):
            errors |= trace.compare(executor.model, measured, pruned.plan, pruned.expected)
    return errors


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Samples | None,
    prompts: Sequence[str],
    runtime: Runtime,
    name: str,
) -> list[str]:
    """Let a model continue the recipe's prompts.

    Args:
        model: dense or pruned.
        tokenizer: the model's tokenizer.
        settings: the recipe's; None for none.
        prompts: their text (``flapkit.run.text.render_prompts``).
        runtime: where it runs.
        name: name of the stage.
    """
    if settings is None:
        return []
    written = []
    with runtime.progress.stage(name, len(settings.prompts), "prompts") as stage:
        runtime.place_(model)
        options = settings.model_dump(exclude={"prompts"})
        for text in write_samples(model, tokenizer, prompts, **options):
            written.append(text)
            stage.advance()
    return written


def pair_samples(settings: Samples | None, dense: Sequence[str], pruned: Sequence[str]) -> list[SampleRecord]:
    """Pair both models' continuations of each prompt."""
    prompts = [_shown(prompt) for prompt in settings.prompts] if settings else []
    return [SampleRecord(*texts) for texts in zip(prompts, dense, pruned, strict=True)]


def _shown(prompt: str | Sequence[Message]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{message.role}: {message.content}" for message in prompt)
