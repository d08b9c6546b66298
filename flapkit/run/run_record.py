"""The record of a run, and the output folder that is written from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapkit.checkpoint.folder import LOCAL_RECIPE, RECIPE
from flapkit.checkpoint.load import processor_files
from flapkit.checkpoint.save import save
from flapkit.evaluation.protocol import MeasuredPerplexity
from flapkit.model.derive import Auto
from flapkit.model.empty import sees
from flapkit.model.plan import PruningPlan
from flapkit.pruning.algorithm import Pruned
from flapkit.pruning.budgets import CostedBudget
from flapkit.pruning.site_errors import SiteError
from flapkit.recipe.dump import dump_published, dump_recipe
from flapkit.recipe.load import LoadedRecipe
from flapkit.run.dtypes import DTypes
from flapkit.run.ledger import ledger
from flapkit.run.next_steps import next_steps
from flapkit.run.report.document import PAGE, RECORD, RunDocument
from flapkit.run.report.figures import draw_figures, draw_structure
from flapkit.run.report.page import render_run
from flapkit.run.report.report_record import SampleRecord, make_record
from flapkit.run.target import Target
from flapkit.run.text import RunText
from flapkit.system.paths import name_only, names_only, without_folders
from flapkit.system.workdir import WorkDir, write_file
from flapkit.text.windows import tokens_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The results of a run, without the model.

    Args:
        recipe: the recipe.
        target: the model's sites.
        tokenizer: the model's tokenizer.
        text: the run's text, as tokens.
        budget: how much was to be removed, and what the model costs.
        pruned: the scores, and the applied plan.
        params: parameters of the dense model, of the pruned one (including added biases), of the blocks, and those
            removed from the blocks.
        perplexity: name of the text -> ``dense`` and ``pruned`` -> perplexity, and how it was measured, as in
            ``result.json``.
        seconds: stage -> wall time.
        warnings: flapkit's warnings.
        dtypes: the dtypes of the computation and of the written checkpoint.
        exports: name of the file or folder below ``exports`` -> the result of its check.
        zero_shot: task -> its settings, and the scores of both models, as in ``result.json``.
        errors: site name -> the error of its consumer's output.
        error_tokens: held-out calibration tokens on which the errors were measured.
        samples: text that both models wrote.
        total_seconds: wall time of the command.
    """

    recipe: LoadedRecipe
    target: Target
    tokenizer: PreTrainedTokenizerBase
    text: RunText
    budget: CostedBudget
    pruned: Pruned
    params: Mapping[str, int]
    perplexity: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float]
    warnings: Sequence[str]
    dtypes: DTypes
    exports: Mapping[str, str] = field(default_factory=dict)
    zero_shot: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, SiteError] = field(default_factory=dict)
    error_tokens: int = 0
    samples: Sequence[SampleRecord] = ()
    total_seconds: float = 0.0

    @property
    def output(self) -> Path:
        """The folder that the run writes."""
        return self.recipe.output

    @property
    def plan(self) -> PruningPlan:
        """The applied plan."""
        return self.pruned.plan

    @property
    def costs(self) -> Sequence[Mapping[str, Any]]:
        """What the model costs in every measure before and after, as in ``result.json``."""
        return [asdict(row) for row in ledger(self.budget.budget, self.budget.costs, self.target.sites, self.plan)]

    def result(self) -> dict[str, Any]:
        """Gather the measurements for ``result.json``."""
        return {
            "params": dict(self.params),
            "costs": list(self.costs),
            "perplexity": self.perplexity,
            "zero_shot": self.zero_shot,
            **({"search": dict(self.pruned.search)} if self.pruned.search else {}),
            "seconds": dict(self.seconds),
            "total_seconds": self.total_seconds,
            "warnings": [without_folders(warning) for warning in self.warnings],
            "next": self.next_steps(self.output.name, name_only(self.recipe.recipe.model.source)),
        }

    def next_steps(self, folder: str, dense: str) -> dict[str, str]:
        """List what to do with the pruned model, purpose -> command, by names of its folder and of the dense model."""
        removed = [name for name, units in self.plan.keep.items() if not units]
        return next_steps(self.recipe, self.target, folder, dense, removed)

    def metadata(self) -> dict[str, Any]:
        """Describe how the model was made, for ``flapkit.json``; files by their names alone."""
        settings, adapter = self.recipe.recipe, self.target.adapter
        derived = adapter.family_of(self.target.config) if isinstance(adapter, Auto) else None
        made: dict[str, Any] = {
            "model": settings.model.model_dump(),
            "adapter": adapter.name,
            **({"declaration": asdict(derived)} if derived else {}),
            **({"unit": self.target.why_unit} if self.target.why_unit else {}),
            "metric": settings.metric.model_dump(),
            "searcher": settings.searcher.model_dump(),
            "compensator": [spec.model_dump() for spec in settings.compensator],
            "budget": settings.budget.model_dump(),
            "calibration": {**settings.calibration.model_dump(), "tokens_sha256": tokens_hash(self.text.calibration)},
            "params": dict(self.params),
            "dtypes": self.dtypes.names(),
            **({"notes": dict(self.pruned.notes)} if self.pruned.notes else {}),
        }
        named: dict[str, Any] = names_only(made)
        return named


def count_params(target: Target, plan: PruningPlan, dense: int, pruned: int) -> dict[str, int]:
    """Gather the parameter counts of a run."""
    blocks = sum(site.params for site in target.sites)
    return {"dense": dense, "pruned": pruned, "blocks": blocks, "removed": plan.removed_params(target.sites)}


def put_texts_beside(models: Mapping[str, Mapping[str, MeasuredPerplexity]]) -> dict[str, dict[str, Any]]:
    """Put the figures of several models side by side, as in ``result.json``.

    Args:
        models: model -> text -> its perplexity; all models have the same texts.

    Returns:
        Text -> the perplexity of each model by its name, and how it was measured.
    """
    texts = next(iter(models.values()))
    return {name: _text_beside({model: of_model[name] for model, of_model in models.items()}) for name in texts}


def _text_beside(models: Mapping[str, MeasuredPerplexity]) -> dict[str, Any]:
    text = next(iter(models.values())).text
    return {
        **{model: measured.perplexity for model, measured in models.items()},
        "bits_per_byte": {model: measured.bits_per_byte for model, measured in models.items()},
        "batch_size": {model: measured.batch_size for model, measured in models.items()},
        "protocol": asdict(text.protocol),
        "overlap": None if text.overlap is None else asdict(text.overlap),
    }


def add_text_beside(known: Mapping[str, Any], model: str, measured: MeasuredPerplexity) -> dict[str, Any]:
    """Add the figures of another model to a text's entry in the result of ``put_texts_beside``."""
    added = _text_beside({model: measured})
    figures = {name: {**known[name], **added[name]} for name in ("bits_per_byte", "batch_size")}
    return {**known, model: added[model], **figures}


def save_run(
    record: RunRecord,
    model: PreTrainedModel,
    files: Mapping[str, bytes] | None = None,
    *,
    weights: Sequence[Path] = (),
    overwrite: bool = False,
    work: WorkDir | None = None,
) -> None:
    """Write the output folder of a run: the checkpoint, and the files that describe how it was made.

    Args:
        record: the results of the run.
        model: the pruned model.
        files: additional files, path in the folder -> content.
        weights: files that already hold the model's weights.
        overwrite: replace a folder that flapkit wrote.
        work: the output's work folder, if it is open.

    Raises:
        OutputError: the folder exists, or cannot be written.
    """
    source = record.recipe.recipe.model
    processor = processor_files(source.source, revision=source.revision) if sees(record.target.config) else {}
    save(
        model if weights else model.cpu(),
        record.output,
        tokenizer=record.tokenizer,
        base=source.path,
        metadata=record.metadata(),
        files={**processor, **run_files(record), **(files or {})},
        weights=weights,
        dtype=record.dtypes.saved,
        overwrite=overwrite,
        work=work,
    )


def rewrite_result(output: Path, result: Mapping[str, Any]) -> None:
    """Write the measurements of a finished output again, and its report: with the time that writing and exports took.

    Args:
        output: the output folder.
        result: the measurements, for ``result.json``.
    """
    write_file(output / "result.json", json.dumps(result, indent=2) + "\n")
    if (output / PAGE).is_file():
        write_file(output / PAGE, render_run(RunDocument.of_folder(output)))


def recipe_files(recipe: LoadedRecipe) -> dict[str, str]:
    """Write a recipe to be published, and one with the folders of this machine, if it names any."""
    published, local = dump_published(recipe), dump_recipe(recipe)
    return {RECIPE: published, **({LOCAL_RECIPE: local} if local != published else {})}


def run_files(record: RunRecord) -> dict[str, str | bytes]:
    """Return the files beside the checkpoint: the recipe, the measurements, and the report."""
    report = make_record(
        name_only(record.recipe.recipe.model.source),
        record.target.sites,
        record.pruned.scores,
        record.plan,
        record.budget.budget,
        errors=record.errors,
        error_tokens=record.error_tokens,
        samples=record.samples,
    )
    document = RunDocument(
        record.output.name, report, record.result(), dump_published(record.recipe), record.metadata()
    )
    forms = record.recipe.recipe.report.figures
    return {
        "result.json": json.dumps(document.result, indent=2) + "\n",
        **recipe_files(record.recipe),
        RECORD: report.to_json(),
        PAGE: render_run(document),
        "structure.png": draw_structure(document),
        **{f"figures/{name}": content for name, content in draw_figures([document], forms).items()},
    }
