"""Recover a pruned checkpoint: train it by a recipe's compensator, and write the trained checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapkit.checkpoint.export import export_all
from flapkit.checkpoint.folder import check_output
from flapkit.checkpoint.load import load, load_tokenizer
from flapkit.checkpoint.save import save
from flapkit.checkpoint.weights import Weights
from flapkit.evaluation.protocol import EvaluationText
from flapkit.evaluation.zero_shot import add_scores
from flapkit.execution.cache import TokenCache
from flapkit.execution.runtime import Runtime
from flapkit.execution.stream import LayerStream
from flapkit.execution.student import Student, WholeStudent, shard_student
from flapkit.execution.training import Recovered, RecoveryText, Workplace, recover_
from flapkit.model.empty import build_empty
from flapkit.model.positions import check_lengths
from flapkit.pruning.components import recovery_of
from flapkit.pruning.recovery import Recovery
from flapkit.recipe.dump import dump_published
from flapkit.recipe.load import LoadedRecipe
from flapkit.run.captured import capture_warnings
from flapkit.run.checkpoint_files import RESULT, Origin
from flapkit.run.dtypes import DTypes, choose_dtypes
from flapkit.run.executors import check_batch_size, load_model, open_runtime, open_stream
from flapkit.run.lengths import evaluation_lengths, recovery_length
from flapkit.run.report.document import PAGE, RunDocument
from flapkit.run.report.page import render_run
from flapkit.run.run_record import add_text_beside, put_texts_beside, recipe_files, rewrite_result
from flapkit.run.target import Target, find_target
from flapkit.run.tasks import evaluate_tasks, load_tasks
from flapkit.run.text import (
    check_evaluation,
    read_evaluations,
    read_recovery_text,
    recovery_source,
    renderer,
    warn_of_overlap,
)
from flapkit.system.errors import OutputError, RecipeError, RunError
from flapkit.system.paths import names_only, without_folders
from flapkit.system.processes import broadcast_from_rank0, is_rank_zero, lost_processes
from flapkit.system.progress import Progress
from flapkit.system.workdir import WorkDir, open_workdir
from flapkit.text.windows import TokenStore, tokens_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flapkit.evaluation.harness import Harness

RECOVERY = "recovery"
"""Folder of a training in the work folder."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """A recovery whose recipe is checked, and everything that it needs beside the pruned model.

    Args:
        recipe: the recipe.
        recovery: the recovery.
        text: training and validation text.
        evaluations: name -> evaluation text.
        tokenizer: the model's tokenizer.
        tasks: zero-shot tasks; None for none.
        runtime: what it runs on.
        dtypes: the types that it computes in and is written in.
    """

    recipe: LoadedRecipe
    recovery: Recovery
    text: RecoveryText
    evaluations: Mapping[str, EvaluationText]
    tokenizer: PreTrainedTokenizerBase
    tasks: Harness | None
    runtime: Runtime
    dtypes: DTypes


@dataclass(frozen=True, slots=True)
class RecoveryRecord:
    """The results of a recovery, without the model.

    Args:
        output: the output folder.
        params: the pruned checkpoint's counts of parameters.
        costs: what it costs in every measure, and the dense model, as in ``result.json``.
        perplexity: name of the text -> ``dense`` if known, ``pruned`` and ``recovered`` -> perplexity, and how it was
            measured, as in ``result.json``.
        zero_shot: task -> its settings, and the scores of the models that were measured.
        recovery: summary of the training.
        search: the course of the pruned checkpoint's search, as in ``result.json``; empty if it had none.
        seconds: stage -> wall time, including those of pruning.
        warnings: flapkit's warnings.
        exports: name of the file or folder below ``exports`` -> the result of its check.
        total_seconds: wall time of the command.
    """

    output: Path
    params: Mapping[str, int]
    costs: Sequence[Mapping[str, Any]]
    perplexity: Mapping[str, Mapping[str, Any]]
    zero_shot: Mapping[str, Any]
    recovery: Mapping[str, Any]
    seconds: Mapping[str, float]
    warnings: Sequence[str]
    search: Mapping[str, Any] = field(default_factory=dict)
    exports: Mapping[str, str] = field(default_factory=dict)
    total_seconds: float = 0.0

    def result(self) -> dict[str, Any]:
        """Gather the measurements for ``result.json``."""
        names = ("params", "costs", "perplexity", "zero_shot", "recovery", "seconds", "total_seconds", "warnings")
        result = {name: getattr(self, name) for name in names} | ({"search": self.search} if self.search else {})
        # Those of the pruning are in the pruned model's record, and, where one command does both, in this one's too.
        return {**result, "warnings": list(dict.fromkeys(map(without_folders, self.warnings)))}


def recover(
    checkpoint: Path,
    recipe: LoadedRecipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> RecoveryRecord:
    """Train a pruned checkpoint by the recipe's compensator with a recovery, and write the recipe's output folder.

    Used of the recipe: that compensator, ``evaluate``, ``trainer`` and ``output``; ``model`` if the dense model is the
    teacher; ``calibration`` if the compensator names no text.

    Args:
        checkpoint: a folder that flapkit wrote.
        recipe: the recipe.
        overwrite: replace an output folder that flapkit wrote; without ``resume``, also an interrupted run's work.
        resume: resume an interrupted training.
        progress: receives the progress of the stages.

    Raises:
        FlapkitError: the recovery fails; the checkpoint is unchanged.
    """
    output = recipe.output
    if output.resolve() == checkpoint.resolve():
        raise OutputError(f"output {output} is the checkpoint itself; choose another, such as --set output=recovered")
    # Refuse damaged files before training.
    Origin.of(checkpoint)
    settings, check = {"recover": str(checkpoint.resolve())}, partial(check_output, output, overwrite=overwrite)
    with (
        open_workdir(output, settings, check=check, resume=resume, overwrite=overwrite) as work,
        capture_warnings() as warnings,
        lost_processes(),
    ):
        target = find_target(recipe.of_model(str(checkpoint)))
        prepared = prepare(recipe, target, progress or Progress(), checkpoint)
        return recover_checkpoint(checkpoint, prepared, warnings, work, overwrite=overwrite)


def prepare(
    recipe: LoadedRecipe,
    target: Target,
    progress: Progress,
    checkpoint: Path | None = None,
    cache: Path | None = None,
) -> Preparation:
    """Read the text of a recovery, and try the recovery on an empty model, before any stage runs.

    Args:
        recipe: the recipe.
        target: the model, dense or pruned.
        progress: receives the progress of the stages.
        checkpoint: the pruned model, if it exists already.
        cache: folder of cached tokens; None for no cache.

    Raises:
        RecipeError: no compensator trains, the model lacks a module to train, or the text is evaluated too.
        DataError: a text cannot be read or is too short.
        ModelError: the model's configuration or tokenizer cannot be read.
    """
    recovery = recovery_of(recipe.compensators)
    if recovery is None:
        raise RecipeError(
            f"{recipe.path}: none of its compensators trains; add one, for example --set 'compensator=[bias, lora]'"
        )
    if recipe.exporters and not recovery.merge:
        raise RecipeError(
            f"{recipe.path}: export: exports would lack the adapter of `merge: false`; set `merge: true`, or remove "
            "`export`"
        )
    check_evaluation(recipe.recipe.evaluate)
    settings, runtime = recipe.recipe, open_runtime(recipe.recipe.trainer, progress)
    with progress.stage("recovery text"):
        path, revision = (
            (settings.model.source, settings.model.revision) if checkpoint is None else (str(checkpoint), None)
        )
        tokenizer, store = load_tokenizer(path, revision=revision), TokenCache(cache)
        empty = build_empty(target.config)
        if checkpoint is not None:
            check_lengths(empty, evaluation_lengths(settings.evaluate, tokenizer, target.adapter))
        tasks = load_tasks(settings.evaluate.zero_shot, tokenizer, empty)
        render = renderer(target.adapter, tokenizer)
        evaluations = read_evaluations(settings.evaluate.perplexity, tokenizer, render, target.vocab_size, store)
        text = read_training(recipe, recovery, target, tokenizer, runtime, evaluations, store)
    dtypes = choose_dtypes(settings.model, target.config, runtime.device)
    return Preparation(recipe, recovery, text, evaluations, tokenizer, tasks, runtime, dtypes)


def read_training(
    recipe: LoadedRecipe,
    recovery: Recovery,
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    runtime: Runtime,
    evaluations: Mapping[str, EvaluationText],
    store: TokenStore,
) -> RecoveryText:
    """Try a recovery on an empty model, and read its text.

    Args:
        recipe: the recipe.
        recovery: its recovery.
        target: the model, dense or pruned.
        tokenizer: the model's tokenizer.
        runtime: what the recovery will run on.
        evaluations: the evaluation texts; there is a warning if the recovery text holds parts of them.
        store: where tokens are kept.

    Raises:
        RecipeError: the text is evaluated too.
        DataError: a text cannot be read or is too short.
        ModelError: the model lacks a module to train.
    """
    empty, source = build_empty(target.config), recovery_source(recovery.training, recipe.recipe)
    check_lengths(empty, recovery_length(recovery.training))
    recovery.attach(empty, target.sites)
    text = read_recovery_text(recovery.training, source, target, tokenizer, runtime, store)
    for name, evaluation in evaluations.items():
        warn_of_overlap(name, evaluation, text.windows, "recovery")
    return text


def recover_checkpoint(
    checkpoint: Path, prepared: Preparation, warnings: Sequence[str], work: WorkDir, *, overwrite: bool
) -> RecoveryRecord:
    """Train a pruned checkpoint, and write the output folder; with several processes, only the first writes.

    Args:
        checkpoint: a folder that flapkit wrote; all processes read it.
        prepared: the recovery and its text.
        warnings: flapkit's warnings, collected during the run.
        work: the output's work folder; a training in it is resumed.
        overwrite: replace an output folder that flapkit wrote.

    Raises:
        RunError: a loss is not finite.
    """
    recipe, progress = prepared.recipe, prepared.runtime.progress
    prepared.runtime.init_processes()
    # All processes must agree on it: their next steps depend on it.
    origin = broadcast_from_rank0(lambda: Origin.of(checkpoint))
    known = origin.known(recipe.recipe, prepared.evaluations)
    with progress.stage("load pruned"):
        student = _open(checkpoint, prepared, work)
    before = known.get("perplexity") or put_texts_beside(
        {"pruned": prepared.runtime.evaluate(student.model, prepared.evaluations, "evaluate pruned")}
    )
    recovered = _train(student, origin, prepared, work.path(RECOVERY))
    student.finish(recovered)
    after = prepared.runtime.evaluate(student.model, prepared.evaluations, "evaluate recovered")
    answers = evaluate_tasks(student.model, prepared.tokenizer, prepared.tasks, prepared.runtime, "zero-shot recovered")
    record = RecoveryRecord(
        output=prepared.recipe.output,
        params=known.get("params", {}),
        costs=known.get("costs", []),
        perplexity={name: add_text_beside(before[name], "recovered", measured) for name, measured in after.items()},
        zero_shot=add_scores(known.get("zero_shot", {}), "recovered", answers),
        recovery={**recovered.summary(), "tokens_sha256": tokens_hash(prepared.text.windows)},
        seconds={**known.get("seconds", {}), **progress.seconds},
        warnings=[*known.get("warnings", []), *warnings],
        search=known.get("search", {}),
    )

    def write() -> None:
        files = {**_files(record, prepared, origin, work.path(RECOVERY)), **student.adapter(recovered)}
        save(
            student.model if student.shards else student.model.cpu(),
            record.output,
            tokenizer=prepared.tokenizer,
            base=recipe.recipe.model.path,
            metadata=_metadata(record, recipe, origin),
            files=files,
            weights=student.shards,
            dtype=prepared.dtypes.saved,
            overwrite=overwrite,
            work=work,
        )
        work.finish()

    with progress.stage("save"):
        broadcast_from_rank0(write)
    if not is_rank_zero():
        return record
    exports = export_all(record.output, recipe.exporters, progress)
    seconds = {**known.get("seconds", {}), **progress.seconds}
    record = dataclasses.replace(record, exports=exports, seconds=seconds, total_seconds=progress.total)
    rewrite_result(record.output, record.result())
    return record


def _open(checkpoint: Path, prepared: Preparation, work: WorkDir) -> Student:
    """Load the pruned model; an adapter that is saved beside it names the output as its base model."""
    recipe, recovery, name = prepared.recipe.of_model(str(checkpoint)), prepared.recovery, prepared.recipe.output.name
    if not prepared.runtime.sharded:
        model = load(str(checkpoint), prepared.dtypes.compute)
        model.name_or_path = name
        return WholeStudent(model, recovery.merge, prepared.dtypes.saved)
    check_batch_size(recipe)
    target = find_target(dataclasses.replace(recipe, exporters=()))

    def open_again(weights: Weights | None) -> LayerStream:
        return open_stream(recipe.recipe, target, prepared.runtime, weights=weights)

    return shard_student(open_again, target.sites, recovery, work.path("trained"), name, prepared.dtypes.saved)


def _train(student: Student, origin: Origin, prepared: Preparation, folder: Path) -> Recovered:
    """Train a pruned model in place; ``folder`` is for checkpoints and logs."""
    recipe, settings, recovery = prepared.recipe, prepared.recipe.recipe, prepared.recovery
    sites = find_target(recipe.of_model(str(origin.folder))).sites
    workplace = Workplace(folder, _identity(recipe, origin), settings.trainer.logger)
    teacher = None
    if recovery.training.distill:
        teacher = load_model(recipe, prepared.runtime)
    try:
        return recover_(
            student.model,
            sites,
            recovery,
            prepared.text,
            prepared.runtime,
            workplace=workplace,
            teacher=teacher,
            trainable=student.trainable,
        )
    except RunError as error:
        raise RunError(f"{error}; the pruned model in {origin.folder} is unchanged") from error


def _identity(recipe: LoadedRecipe, origin: Origin) -> dict[str, Any]:
    """Return everything that a training depends on."""
    trained = next(spec for component, spec in recipe.named_compensators if component.recovery())
    return {
        "compensator": trained.model_dump(mode="json"),
        "trainer": recipe.recipe.trainer.model_dump(mode="json", exclude={"logger"}),
        "calibration": recipe.recipe.calibration.model_dump(mode="json"),
        "model": recipe.recipe.model.model_dump(mode="json"),
        "checkpoint": str(origin.folder.resolve()),
        "plan": json.loads(origin.plan.to_json()),
    }


def _files(record: RecoveryRecord, prepared: Preparation, origin: Origin, logs: Path) -> dict[str, bytes | str]:
    """Gather the files beside the model: the pruned checkpoint's files, the logs, the measurements and the report."""
    files: dict[str, bytes | str] = {
        **{name: path.read_bytes() for name, path in origin.carried.items() if path.is_file()},
        **{str(path.relative_to(logs)): path.read_bytes() for path in (logs / "logs").rglob("*") if path.is_file()},
        RESULT: json.dumps(record.result(), indent=2) + "\n",
        **recipe_files(prepared.recipe),
    }
    if origin.record is not None:
        made, text = _metadata(record, prepared.recipe, origin), dump_published(prepared.recipe)
        document = RunDocument(record.output.name, origin.record, record.result(), text, made)
        files[PAGE] = render_run(document)
    return files


def _metadata(record: RecoveryRecord, recipe: LoadedRecipe, origin: Origin) -> dict[str, Any]:
    compensator = [spec.model_dump(mode="json") for spec in recipe.recipe.compensator]
    made = {**origin.made, "compensator": compensator, "recovery": dict(record.recovery)}
    named: dict[str, Any] = names_only(made)
    return named
