"""What a run leaves: its record, and the output folder that is written from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapkit.checkpoint.save import save
from flapkit.evaluation.protocol import MeasuredPerplexity
from flapkit.model.derive import Auto
from flapkit.model.plan import Budget, PruningPlan
from flapkit.pruning.method import Pruned
from flapkit.pruning.site_errors import SiteError
from flapkit.recipe.dump import dump_recipe
from flapkit.recipe.load import LoadedRecipe
from flapkit.run.report.document import PAGE, RECORD, RunDocument
from flapkit.run.report.figures import draw_figures, draw_structure
from flapkit.run.report.page import render_run
from flapkit.run.report.record import SampleRecord, make_record
from flapkit.run.target import Target
from flapkit.run.text import RunText
from flapkit.system.workdir import WorkDir
from flapkit.text.windows import tokens_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All that is known at the end of a run, but for the model itself: what reports and exports are made of.

    Args:
        recipe: what was asked for.
        target: what was pruned.
        tokenizer: the model's.
        text: the run's text, as tokens.
        budget: how much was to go.
        pruned: the scores, and the plan that was carried out.
        params: parameters of the dense model, of the pruned one (added biases included), and of the blocks, with what
            the plan removed of them.
        perplexity: name of the text -> ``dense`` and ``pruned`` -> perplexity, and how it was measured, as in
            ``result.json``.
        seconds: stage -> wall time.
        warnings: what flapkit warned of.
        exports: name of the file or folder below ``exports`` -> what agreed to what.
        zero_shot: task -> what was asked, and the scores of both models, as in ``result.json``.
        errors: site name -> how far its consumer's output moved.
        error_tokens: held-out calibration tokens that the errors were measured on.
        samples: text that both models wrote.
    """

    recipe: LoadedRecipe
    target: Target
    tokenizer: PreTrainedTokenizerBase
    text: RunText
    budget: Budget
    pruned: Pruned
    params: Mapping[str, int]
    perplexity: Mapping[str, Mapping[str, Any]]
    seconds: Mapping[str, float]
    warnings: Sequence[str]
    exports: Mapping[str, str] = field(default_factory=dict)
    zero_shot: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, SiteError] = field(default_factory=dict)
    error_tokens: int = 0
    samples: Sequence[SampleRecord] = ()

    @property
    def output(self) -> Path:
        """The folder that the run writes."""
        return Path(self.recipe.recipe.output).expanduser()

    @property
    def plan(self) -> PruningPlan:
        """The plan that was carried out."""
        return self.pruned.plan

    def result(self) -> dict[str, Any]:
        """Gather what was measured, for ``result.json``."""
        return {
            "params": dict(self.params),
            "perplexity": self.perplexity,
            "zero_shot": self.zero_shot,
            "seconds": dict(self.seconds),
            "warnings": list(self.warnings),
        }

    def metadata(self) -> dict[str, Any]:
        """Say what made the model, for ``flapkit.json``."""
        asked, adapter = self.recipe.recipe, self.target.adapter
        derived = adapter.family_of(self.target.config) if isinstance(adapter, Auto) else None
        return {
            "model": asked.model.model_dump(),
            "adapter": adapter.name,
            **({"declaration": asdict(derived)} if derived else {}),
            "metric": asked.metric.model_dump(),
            "searcher": asked.searcher.model_dump(),
            "compensator": [each.model_dump() for each in asked.compensator],
            "budget": asked.budget.model_dump(),
            "calibration": {**asked.calibration.model_dump(), "tokens_sha256": tokens_hash(self.text.calibration)},
            "params": dict(self.params),
            **({"notes": dict(self.pruned.notes)} if self.pruned.notes else {}),
        }


def count_params(target: Target, plan: PruningPlan, dense: int, pruned: int) -> dict[str, int]:
    """Gather the parameter counts of a run."""
    blocks = sum(site.params for site in target.sites)
    return {"dense": dense, "pruned": pruned, "blocks": blocks, "removed": plan.removed_params(target.sites)}


def compare(
    dense: Mapping[str, MeasuredPerplexity], pruned: Mapping[str, MeasuredPerplexity]
) -> dict[str, dict[str, Any]]:
    """Put the figures of the dense and of the pruned model side by side, by the name of the text."""
    return put_texts_beside({"dense": dense, "pruned": pruned})


def put_texts_beside(models: Mapping[str, Mapping[str, MeasuredPerplexity]]) -> dict[str, dict[str, Any]]:
    """Put the figures of some models side by side, as in ``result.json``.

    Args:
        models: model -> text -> what was measured; the same texts of every model.

    Returns:
        Text -> the perplexity of each model by its name, and how it was measured.
    """
    texts = next(iter(models.values()))
    return {name: _text_beside({model: found[name] for model, found in models.items()}) for name in texts}


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
    """Put the figures of one more model beside those of one text that are known, as ``put_texts_beside`` gives them."""
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
    """Write the output folder of a run: the checkpoint, and the files that say what made it.

    Args:
        record: what was done.
        model: the pruned model.
        files: more files, by their path in the folder.
        weights: files that hold the model's weights already.
        overwrite: replace a folder that flapkit wrote.
        work: the output's work folder, where it is held already.

    Raises:
        OutputError: the folder exists, or cannot be written.
    """
    save(
        model if weights else model.cpu(),
        record.output,
        record.plan,
        tokenizer=record.tokenizer,
        metadata=record.metadata(),
        files={**run_files(record), **(files or {})},
        weights=weights,
        overwrite=overwrite,
        work=work,
    )


def run_files(record: RunRecord) -> dict[str, str | bytes]:
    """Write what stands beside the checkpoint: what was asked, what was measured, and the report of it."""
    noted = make_record(
        record.recipe.recipe.model.path,
        record.target.sites,
        record.pruned.scores,
        record.plan,
        record.budget,
        errors=record.errors,
        error_tokens=record.error_tokens,
        samples=record.samples,
    )
    document = RunDocument(record.output.name, noted, record.result(), dump_recipe(record.recipe), record.metadata())
    forms = record.recipe.recipe.report.figures
    return {
        "result.json": json.dumps(document.result, indent=2) + "\n",
        "recipe.yaml": document.recipe,
        RECORD: noted.to_json(),
        PAGE: render_run(document),
        "structure.png": draw_structure(document),
        **{f"figures/{name}": content for name, content in draw_figures([document], forms).items()},
    }
