"""Prune in one call from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pydantic
from torch import Tensor, nn
from torch.utils.data import Dataset

from flapkit.execution.executor import CalibrationText
from flapkit.execution.executor import prune_ as run_pruning_
from flapkit.execution.lightning.prune import PruneBeforeTraining
from flapkit.execution.runtime import Runtime
from flapkit.execution.training import RecoveryText, recover_, take_windows
from flapkit.execution.whole import WholeExecutor
from flapkit.model.adapter import ArchitectureAdapter
from flapkit.model.budget import Budget, BudgetBase, Rounding
from flapkit.model.classes import check_head, pruned_classes
from flapkit.model.empty import CAUSAL_LM, IMAGE_TEXT
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.model.soundness import check_in_memory, check_plain, check_unquantised, check_weights
from flapkit.model.spread import is_spread
from flapkit.pruning.algorithm import Method
from flapkit.pruning.budget_keys import BudgetSection
from flapkit.pruning.budgets import work_out
from flapkit.pruning.collector import needs_gradient
from flapkit.pruning.components import (
    Compensator,
    ImportanceMetric,
    StructureSearcher,
    TrainedSearcher,
    TrialSearcher,
    recovery_of,
)
from flapkit.pruning.gates import check_gated
from flapkit.pruning.recovery import Recovery
from flapkit.pruning.unit_choice import budget_obstacle, choose_unit
from flapkit.registry import COMPENSATOR, METRIC, SEARCHER, Choice, Registry
from flapkit.system.errors import BudgetError, ModelError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneOptions:
    """Further options of ``prune_``.

    Args:
        multiple_of: round the pruned widths to multiples of this.
        tensor_parallel: round heads and widths further, so that this many devices can share every layer.
        head_counts: the largest number of distinct key/value head counts over all layers; None for any.
        batch_size: calibration windows that go through the model at once.
        statistics_memory: bytes for statistics; if they need more, the text runs through the model several times.
        sequential: repair in one sweep over the layers, in which each site also repairs the error of the earlier ones.
        recovery_text: tokens [windows, tokens] for a compensator that trains; one window in ten is held out for
            validation.
    """

    multiple_of: int = 1
    tensor_parallel: int = 1
    head_counts: int | None = None
    batch_size: int = 8
    statistics_memory: float = 4e9
    sequential: bool = False
    recovery_text: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            RecipeError: one of them is not positive.
        """
        for name in ("multiple_of", "tensor_parallel", "head_counts", "batch_size", "statistics_memory"):
            value = getattr(self, name)
            if value is None and name == "head_counts":
                continue
            if not isinstance(value, (int, float)) or not value > 0:
                raise RecipeError(f"{name}: expected a number above 0, found {value!r}")

    @property
    def rounding(self) -> Rounding:
        """The sizes that the pruned layers may have."""
        return Rounding(self.multiple_of, self.tensor_parallel, self.head_counts or 0)


DEFAULTS = PruneOptions()


def sites(model: PreTrainedModel, adapter: ArchitectureAdapter | Choice | None = None) -> tuple[Site, ...]:
    """List the sites of a model.

    Args:
        model: a transformers causal language model.
        adapter: an adapter, a name, or a mapping of a name and options; by default (``auto``) the one that declares the
            model's type, otherwise one that is derived and verified.

    Raises:
        ModelError: no adapter declares the model, and none can be derived.
    """
    check_plain(model)
    return Registry.load().resolve(adapter, model.config).sites(model.config)


def prune_(
    model: PreTrainedModel,
    calibration: Tensor | Dataset[Any],
    metric: ImportanceMetric | Choice = "wifv",
    searcher: StructureSearcher | Choice = "al_am",
    compensator: Compensator | Choice | Sequence[Compensator | Choice] = "bias",
    ratio: float | None = None,
    *,
    of: BudgetBase = "blocks",
    budget: Mapping[str, Any] | None = None,
    adapter: ArchitectureAdapter | Choice | None = None,
    options: PruneOptions = DEFAULTS,
) -> PruningPlan:
    """Prune a model in place, on its device.

    ```python
    flapkit.prune_(model, tokens, ratio=0.3)
    flapkit.prune_(model, tokens, budget={"memory": "200MB"})
    ```

    A component is a name, such as ``"al_am"``; a mapping of its name and options, as in a recipe, such as
    ``{"name": "al_am", "attention_power": 1}``; or an object.

    Args:
        model: a transformers model: a causal language model, or a classifier of sequences or tokens made from one.
        calibration: tokens [windows, tokens], or a dataset of mappings with ``input_ids`` [tokens] and, where rows
            are padded, ``attention_mask`` [tokens].
        metric: scores the units.
        searcher: chooses the units to keep.
        compensator: repairs the loss; one or several.
        ratio: fraction of the parameters to remove; 0.2 without this and ``budget``.
        of: the parameters that the ratio refers to.
        budget: instead of a ratio: the keys of a recipe's ``budget``, such as ``{"kv_cache": 0.5}``. ``memory`` counts
            weights in the model's own type.
        adapter: an adapter, a name, or a mapping of a name and options; by default (``auto``) the one that declares the
            model's type, otherwise one that is derived and verified.
        options: further options.

    Returns:
        The applied plan.

    Raises:
        FlapkitError: the model cannot be pruned; it is then unchanged.
    """
    if not isinstance(options, PruneOptions):
        raise RecipeError(f"options: expected flapkit.PruneOptions, found a {type(options).__name__}")
    asked = None if budget is None else _asked(budget, ratio, of, options)
    registry = Registry.load()
    method = _method(registry, metric, searcher, compensator)
    _check_model(model, method)
    recovery = recovery_of(method.compensators)
    training_text = _recovery_text(model, recovery, options)
    text = CalibrationText(calibration, options.batch_size)
    text.check(model)
    resolved = registry.resolve(adapter, model.config)
    kind, devices = ("ratio", options.tensor_parallel) if asked is None else (asked.kind, asked.tensor_parallel)
    chosen = choose_unit(resolved, model.config, lambda single: budget_obstacle(single, kind, devices))
    resolved, model_sites = chosen.adapter, chosen.sites
    resolved.check_declaration(model.config)
    params = model.num_parameters()
    if asked is None:
        removed = Budget.over(model_sites, 0.2 if ratio is None else ratio, of, params, options.rounding)
    else:
        name = str(model.config.name_or_path or "MODEL")
        costed = work_out(asked, model, model_sites, params, model.dtype, biased=method.adds_bias, name=name)
        removed = costed.budget
    if isinstance(method.searcher, TrainedSearcher):
        _check_gated(model, model_sites)
    if all(site.block for site in model_sites):
        check_head(model)
    was_training = model.training
    model.eval()
    try:
        if _is_language_model(model):
            resolved.confirm(model, model_sites)
        executor = WholeExecutor(model, model_sites, text, memory=options.statistics_memory)
        plan = run_pruning_(executor, method, removed, sequential=options.sequential).plan
        if recovery is not None and training_text is not None:
            _recover_(model, model_sites, recovery, training_text)
    finally:
        model.train(was_training)
    return plan


def _asked(budget: Mapping[str, Any], ratio: float | None, of: BudgetBase, options: PruneOptions) -> BudgetSection:
    """Read a budget's keys, with the rounding of the options.

    Raises:
        BudgetError: a key is unknown or has a wrong value, or a ratio is given beside it.
    """
    if ratio is not None or of != "blocks":
        raise BudgetError("budget: leave out `ratio` and `of`, or give them as its keys")
    rounding = {"multiple_of": options.multiple_of, "tensor_parallel": options.tensor_parallel}
    given = {key: size for key, size in rounding.items() if size != 1}
    if options.head_counts is not None:
        given["head_counts"] = options.head_counts
    try:
        return BudgetSection.model_validate({**given, **budget})
    except pydantic.ValidationError as error:
        problems = [(".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors()]
        raise BudgetError("; ".join(f"budget{f'.{key}' if key else ''}: {text}" for key, text in problems)) from error


def _check_model(model: PreTrainedModel, method: Method) -> None:
    """Refuse a model that cannot be pruned, or not by this method."""
    check_plain(model)
    check_in_memory(model)
    name = str(model.config.name_or_path or type(model).__name__)
    check_unquantised(name, model.config)
    check_weights(name, model.named_parameters())
    if is_spread(model) and recovery_of(method.compensators) is not None:
        raise ModelError(
            "a compensator that trains needs the model on one device, and this one is spread over several; load it "
            "without device_map"
        )
    if _is_language_model(model):
        return
    of_language = {
        f"metric {method.metric.name!r}": needs_gradient(method.statistics),
        f"searcher {method.searcher.name!r}": isinstance(method.searcher, (TrialSearcher, TrainedSearcher)),
        "a compensator that trains": recovery_of(method.compensators) is not None,
    }
    for what, is_used in of_language.items():
        if is_used:
            raise ModelError(f"{what} needs the loss of a language model, and this is a {type(model).__name__}")


def _check_gated(model: PreTrainedModel, sites: Sequence[Site]) -> None:
    """Refuse a model whose gates cannot be trained."""
    check_gated(sites)
    if len(devices := {parameter.device for parameter in model.parameters()}) > 1:
        raise ModelError(
            f"the model is on {', '.join(sorted(map(str, devices)))}; a searcher that trains gates needs it on one "
            "device: load it without a device_map, or choose another searcher"
        )


def _is_language_model(model: PreTrainedModel) -> bool:
    classes = pruned_classes(model.config.model_type)
    return classes is None or classes.head_of(model) in (CAUSAL_LM, IMAGE_TEXT, None)


def _recovery_text(model: PreTrainedModel, recovery: Recovery | None, options: PruneOptions) -> RecoveryText | None:
    """Part the recovery's windows, where there is a recovery."""
    tokens = options.recovery_text
    if (recovery is None) != (tokens is None):
        raise RecipeError(
            "recovery_text needs a compensator that trains, such as `lora`"
            if recovery is None
            else "a compensator trains: set PruneOptions(recovery_text=...) to tokens [windows, tokens]"
        )
    if recovery is None or tokens is None:
        return None
    text = take_windows(recovery.training, tokens)
    CalibrationText(tokens).check(model, "recovery_text")
    return text


def _recover_(model: PreTrainedModel, sites: Sequence[Site], recovery: Recovery, text: RecoveryText) -> None:
    device = model.device
    recover_(model, sites, recovery, text, Runtime.on(device))
    nn.Module.to(model, device)


def _method(
    registry: Registry,
    metric: ImportanceMetric | Choice,
    searcher: StructureSearcher | Choice,
    compensator: Compensator | Choice | Sequence[Compensator | Choice],
) -> Method:
    """Build the components that prune."""
    compensators = compensator if isinstance(compensator, (list, tuple)) else [compensator]
    return Method(
        registry.build(METRIC, metric),
        registry.build(SEARCHER, searcher),
        tuple(registry.build(COMPENSATOR, choice) for choice in compensators),
    )


class FlapPruning(PruneBeforeTraining):
    """Prune a model before it is trained, in your own script: ``Trainer(callbacks=[FlapPruning(...)])``.

    It prunes before the optimizer is created; the module has its transformers model in the attribute
    ``model``. Lightning's checkpoints contain the plan: a resumed training slices the dense model by it. For
    ``load_from_checkpoint``, see ``flapkit.restore_pruning_``.

    Args:
        calibration: tokens [windows, tokens], or a dataset of mappings with ``input_ids``.
        ratio: fraction of the parameters to remove.
        metric: as for ``prune_``, like the following.
        searcher: chooses the units to keep.
        compensator: repairs the loss; one or several.
        of: the parameters that the ratio refers to.
        budget: instead of a ratio, as for ``prune_``.
        adapter: describes the model.
        options: further options.

    Attributes:
        plan: the applied plan; None before.
    """

    def __init__(
        self,
        calibration: Tensor | Dataset[Any],
        ratio: float | None = None,
        metric: ImportanceMetric | Choice = "wifv",
        searcher: StructureSearcher | Choice = "al_am",
        compensator: Compensator | Choice | Sequence[Compensator | Choice] = "bias",
        of: BudgetBase = "blocks",
        budget: Mapping[str, Any] | None = None,
        adapter: ArchitectureAdapter | Choice | None = None,
        options: PruneOptions = DEFAULTS,
    ) -> None:
        self._calibration = calibration
        self._options: dict[str, Any] = {
            "ratio": ratio,
            "metric": metric,
            "searcher": searcher,
            "compensator": compensator,
            "of": of,
            "budget": budget,
            "adapter": adapter,
            "options": options,
        }

    def prune(self, model: PreTrainedModel) -> PruningPlan:
        """Prune the model in place."""
        return prune_(model, self._calibration, **self._options)
