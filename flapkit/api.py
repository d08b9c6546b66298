"""Pruning in one call from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from flapkit.execution.executor import CalibrationText
from flapkit.execution.executor import prune_ as run_pruning_
from flapkit.execution.lightning.prune import PruneBeforeTraining
from flapkit.execution.runtime import Runtime
from flapkit.execution.training import recover_, take_windows
from flapkit.execution.whole import WholeExecutor
from flapkit.model.adapter import ArchitectureAdapter
from flapkit.model.plan import Budget, BudgetBase, PruningPlan
from flapkit.model.site import Site
from flapkit.model.soundness import check_unquantised, check_weights
from flapkit.pruning.components import Compensator, ImportanceMetric, StructureSearcher, recovery_of
from flapkit.pruning.method import Method
from flapkit.pruning.recovery import Recovery
from flapkit.registry import Registry
from flapkit.system.errors import RecipeError


def sites(model: PreTrainedModel, adapter: str | ArchitectureAdapter | None = None) -> tuple[Site, ...]:
    """List the prunable places of a model.

    Args:
        model: a transformers causal language model.
        adapter: a name or an adapter; by default (``auto``) the one that declares the model's type, or else one that is
            derived and verified.

    Raises:
        ModelError: no adapter declares the model, and none can be derived.
    """
    return Registry.load().resolve(adapter, model.config).sites(model.config)


def prune_(
    model: PreTrainedModel,
    calibration: Tensor | Dataset[Any],
    metric: str | ImportanceMetric = "wifv",
    searcher: str | StructureSearcher = "al_am",
    compensator: str | Compensator | Sequence[str | Compensator] = "bias",
    ratio: float = 0.2,
    *,
    of: BudgetBase = "blocks",
    multiple_of: int = 1,
    adapter: str | ArchitectureAdapter | None = None,
    batch_size: int = 8,
    statistics_memory: float = 4e9,
    sequential: bool = False,
    recovery_text: Tensor | None = None,
) -> PruningPlan:
    """Prune a model in place, on the device where it is.

    Args:
        model: a transformers causal language model.
        calibration: tokens [windows, tokens], or a dataset of mappings with ``input_ids`` [tokens] and, where rows
            are padded, ``attention_mask`` [tokens].
        metric: a name, or a component with its options.
        searcher: a name, or a component with its options.
        compensator: a name, or a component with its options; or several.
        ratio: fraction of the parameters to remove.
        of: what the ratio counts.
        multiple_of: what the pruned widths are rounded to a multiple of.
        adapter: a name or an adapter; by default (``auto``) the one that declares the model's type, or else one that is
            derived and verified.
        batch_size: calibration windows that go through the model at once.
        statistics_memory: bytes for statistics; where they need more, the text runs through the model several times.
        sequential: measure each site in a model whose earlier sites are pruned, and repair what they lost as well.
        recovery_text: tokens [windows, tokens] for a compensator that trains; one window in ten is held out, to
            validate on.

    Returns:
        The plan that was carried out.

    Raises:
        FlapkitError: whatever keeps the model from being pruned; it is then as it was.
    """
    registry = Registry.load()
    method = Method(
        _component(registry, "metric", metric),
        _component(registry, "searcher", searcher),
        tuple(_component(registry, "compensator", each) for each in _several(compensator)),
    )
    recovery = recovery_of(method.compensators)
    if (recovery is None) != (recovery_text is None):
        raise RecipeError(
            "recovery_text goes with a compensator that trains, such as `lora`, and none of them does"
            if recovery is None
            else "a compensator trains: give prune_ tokens [windows, tokens] as recovery_text"
        )
    name = str(model.config.name_or_path or type(model).__name__)
    check_unquantised(name, model.config)
    check_weights(name, model.named_parameters())
    found = registry.resolve(adapter, model.config)
    places = found.sites(model.config)
    budget = Budget.over(places, ratio, of, model.num_parameters(), multiple_of)
    was_training = model.training
    model.eval()
    try:
        found.confirm(model, places)
        text = CalibrationText(calibration, batch_size)
        executor = WholeExecutor(model, places, text, memory=statistics_memory)
        plan = run_pruning_(executor, method, budget, sequential=sequential).plan
        if recovery is not None and recovery_text is not None:
            _recover_(model, places, recovery, recovery_text)
    finally:
        model.train(was_training)
    return plan


def _recover_(model: PreTrainedModel, sites: Sequence[Site], recovery: Recovery, tokens: Tensor) -> None:
    device = model.device
    options = {"accelerator": "cpu", "devices": 1} if device.type == "cpu" else {"devices": [device.index or 0]}
    recover_(model, sites, recovery, take_windows(recovery.training, tokens), Runtime(options))
    nn.Module.to(model, device)


def _component(registry: Registry, kind: str, component: Any) -> Any:
    return registry.create(kind, component) if isinstance(component, str) else component


def _several(compensator: str | Compensator | Sequence[str | Compensator]) -> Sequence[str | Compensator]:
    return [compensator] if isinstance(compensator, (str, Compensator)) else compensator


class FlapPruning(PruneBeforeTraining):
    """Prune a model before it is trained, in a script of your own: ``Trainer(callbacks=[FlapPruning(...)])``.

    Works in ``setup``, before the optimizer takes hold of the weights; the module keeps its transformers model in
    the attribute ``model``.

    Args:
        calibration: tokens [windows, tokens], or a dataset of mappings with ``input_ids``.
        ratio: fraction to remove.
        metric: a name, or a component.
        searcher: a name, or a component.
        compensator: a name, or a component; or several.
        of: what the ratio counts.

    Attributes:
        plan: the plan that was carried out, once it was.
    """

    def __init__(
        self,
        calibration: Tensor | Dataset[Any],
        ratio: float,
        metric: str | ImportanceMetric = "wifv",
        searcher: str | StructureSearcher = "al_am",
        compensator: str | Compensator | Sequence[str | Compensator] = "bias",
        of: BudgetBase = "blocks",
    ) -> None:
        self._calibration = calibration
        self._options: dict[str, Any] = {
            "ratio": ratio,
            "metric": metric,
            "searcher": searcher,
            "compensator": compensator,
            "of": of,
        }

    def prune(self, model: PreTrainedModel) -> PruningPlan:
        """Prune the model in place."""
        return prune_(model, self._calibration, **self._options)
