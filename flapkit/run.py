"""Run a recipe: load, evaluate, calibrate, prune, evaluate again, save."""

from __future__ import annotations

import json
import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flapkit.calibration import needed_statistics, needs_gradient
from flapkit.checkpoint import check_output, load, load_config, load_tokenizer, save
from flapkit.checkpoint.families import family_of
from flapkit.conversations import renderer
from flapkit.errors import ModelError, RunError
from flapkit.interfaces import ArchitectureAdapter
from flapkit.plan import Budget, PruningPlan
from flapkit.recipe import LoadedRecipe, Perplexity, Text, dump_recipe
from flapkit.report.structure import draw_structure
from flapkit.sites import Site
from flapkit.text import TextSource
from flapkit.windows import Windows, cut_windows, draw_windows, encode, tokens_hash

Measured = Mapping[str, float]
"""What was evaluated -> perplexity."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Target:
    """What a recipe prunes, as far as the model's configuration tells.

    Args:
        config: the dense model's configuration.
        adapter: describes the model.
        sites: its prunable places.
    """

    config: PreTrainedConfig
    adapter: ArchitectureAdapter
    sites: tuple[Site, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """What a run did.

    Args:
        output: the folder that was written.
        plan: the plan that was carried out.
        params: parameters of the dense model, of the pruned one (added biases included), and of the blocks, with what
            the plan removed of them.
        perplexity: name of the text -> before and after.
        seconds: stage -> wall time.
    """

    output: Path
    plan: PruningPlan
    params: Mapping[str, int]
    perplexity: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]

    def to_json(self) -> str:
        """Write everything but the plan, which has its own file, as JSON."""
        data = {name: value for name, value in asdict(self).items() if name not in ("output", "plan")}
        return json.dumps(data, indent=2) + "\n"


def find_target(recipe: LoadedRecipe) -> Target:
    """Read the model's configuration, and find its adapter and its sites.

    Raises:
        ModelError: the model is missing, has no adapter, or could not be saved once pruned.
    """
    model = recipe.recipe.model
    config = load_config(model.path, revision=model.revision)
    adapter = recipe.adapter or recipe.registry.adapter_for(config)
    if family_of(config) is None:
        raise ModelError(f"pruned models of type {config.model_type!r} cannot be saved: there is no class for them")
    try:
        return Target(config, adapter, adapter.sites(config))
    except AttributeError as error:
        raise ModelError(
            f"model {model.path}: adapter {adapter.name!r} does not fit models of type {config.model_type!r} "
            f"({error}); leave `adapter` out, or name the right one"
        ) from error


def run(recipe: LoadedRecipe, *, overwrite: bool = False, progress: bool = False) -> Result:
    """Carry out a recipe, and write its output folder as the last thing.

    Args:
        recipe: what to do.
        overwrite: replace an output folder that flapkit wrote.
        progress: show a progress bar for each stage.

    Raises:
        FlapkitError: whatever keeps the run from its end; nothing is written then.
    """
    # Lightning takes seconds to import; what only checks recipes does without.
    from flapkit.callbacks import Calibrate, Evaluate, Prune, build_trainer
    from flapkit.data import PruningData
    from flapkit.module import CausalLM

    asked = recipe.recipe
    output = Path(asked.output).expanduser()
    check_output(output, overwrite=overwrite)
    seconds: dict[str, float] = {}
    with _stage("text", seconds):
        target = find_target(recipe)
        tokenizer = load_tokenizer(asked.model.path, revision=asked.model.revision)
        calibration, evaluations = _texts(recipe, target, tokenizer)
        data = PruningData(
            calibration,
            evaluations,
            batch_size=asked.calibration.batch_size,
            evaluation_batch_size={name: text.batch_size for name, text in _named(asked.evaluate.perplexity).items()},
        )
    with _stage("load", seconds):
        model = load(asked.model.path, asked.model.dtype, revision=asked.model.revision)
        dense_params = model.num_parameters()
        budget = Budget.over(target.sites, asked.budget.ratio, asked.budget.of, dense_params)
    statistics = needed_statistics([recipe.metric, *recipe.compensators])
    calibrate = Calibrate(target.sites, statistics)
    prune = Prune(calibrate, target.sites, recipe.metric, recipe.searcher, recipe.compensators, budget)
    evaluate = Evaluate(data.evaluation_names)
    options = {name: value for name, value in asked.trainer.model_dump().items() if value is not None}
    module = CausalLM(model, calibrate_gradient=needs_gradient(statistics))

    def measure(stage: str) -> Measured:
        if not evaluations:
            return {}
        with _stage(stage, seconds):
            _quietly(build_trainer([evaluate], progress=progress, **options).test, module, data, verbose=False)
            strided = {name: text.stride is not None for name, text in _named(asked.evaluate.perplexity).items()}
            return {
                name: float(values.over_tokens if strided[name] else values.over_windows)
                for name, values in evaluate.results.items()
            }

    before = measure("evaluate dense")
    with _stage("calibrate and prune", seconds):
        trainer = build_trainer([calibrate, prune], progress=progress, **options)
        _quietly(trainer.predict, module, data, return_predictions=False)
    after = measure("evaluate pruned")
    if prune.plan is None:
        raise RunError("the run was stopped before the model was pruned")
    blocks = sum(site.params for site in target.sites)
    result = Result(
        output,
        prune.plan,
        {
            "dense": dense_params,
            "pruned": model.num_parameters(),
            "blocks": blocks,
            "removed": prune.plan.removed_params(target.sites),
        },
        {name: {"dense": before[name], "pruned": after[name]} for name in before},
        seconds,
    )
    with _stage("save", seconds):
        _save(recipe, target, model.cpu(), tokenizer, result, tokens_hash(calibration), overwrite=overwrite)
    return result


def _save(
    recipe: LoadedRecipe,
    target: Target,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    result: Result,
    calibration_hash: str,
    *,
    overwrite: bool,
) -> None:
    asked = recipe.recipe
    title = f"{asked.model.path}: {asked.budget.ratio:.0%} of {asked.budget.of} by {asked.metric.name}"
    save(
        model,
        result.output,
        result.plan,
        tokenizer=tokenizer,
        metadata={
            "model": asked.model.model_dump(),
            "adapter": target.adapter.name,
            "metric": asked.metric.model_dump(),
            "searcher": asked.searcher.model_dump(),
            "compensator": [each.model_dump() for each in asked.compensator],
            "budget": asked.budget.model_dump(),
            "calibration": {**asked.calibration.model_dump(), "tokens_sha256": calibration_hash},
            "params": dict(result.params),
        },
        files={
            "result.json": result.to_json(),
            "recipe.yaml": dump_recipe(recipe),
            "structure.png": draw_structure(target.sites, result.plan, title),
        },
        overwrite=overwrite,
    )


def _texts(recipe: LoadedRecipe, target: Target, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, dict[str, Windows]]:
    """Read all text of a run before any model is loaded, so that what is wrong with it is known at once."""
    render = renderer(target.adapter, tokenizer)
    vocabulary = target.config.vocab_size
    text = recipe.recipe.calibration
    source = _source(text)
    calibration = draw_windows(
        tokenizer,
        source.documents("calibration", render),
        source.separator("calibration"),
        samples=text.samples,
        length=text.length,
        seed=text.seed,
        vocab_size=vocabulary,
    )
    evaluations = {}
    for name, evaluation in _named(recipe.recipe.evaluate.perplexity).items():
        source = _source(evaluation)
        documents = source.documents("evaluation", render)
        tokens = encode(tokenizer, documents, source.separator("evaluation") or "\n\n", vocabulary)
        evaluations[name] = cut_windows(tokens, evaluation.length, evaluation.stride, evaluation.windows)
    return calibration, evaluations


def _source(text: Text) -> TextSource:
    return TextSource(text.dataset, text.subset, text.split, text.field)


def _named(texts: Sequence[Perplexity]) -> dict[str, Perplexity]:
    """Name evaluations by what they are, and number those that would be called the same."""
    names: dict[str, Perplexity] = {}
    for text in texts:
        name = f"{text.dataset}{f' {text.split}' if text.split else ''}, {text.length} tokens"
        name += f", stride {text.stride}" if text.stride else ""
        same = sum(known.split(" #")[0] == name for known in names)
        names[f"{name} #{same + 1}" if same else name] = text
    return names


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    log.info("%s ...", name)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
    log.info("%s: %.1f s", name, seconds[name])


def _quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call Lightning without its advice on loader workers, which windows in memory do not need.

    Ctrl-C stays a ``KeyboardInterrupt``: Lightning would exit with code 1 and leave SIGINT ignored.
    """
    handler = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*treespec.*")
        try:
            call(*args, **kwargs)
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            signal.signal(signal.SIGINT, handler)
            raise error.__context__ from None
