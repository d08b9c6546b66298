"""Sequential calibration: each site is measured in a model whose earlier sites are pruned, against the dense model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flapkit.execution.resume import Keep, Record, Repair, make_without_store
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site
from flapkit.model.surgery import consumer_of, mask_
from flapkit.pruning.collector import AllSeen, Batch, Collector, Statistics, run_batch
from flapkit.pruning.components import Compensator, corrector_of
from flapkit.pruning.method import find_corrections
from flapkit.pruning.statistics import SiteStatistics, Statistic, TargetGram
from flapkit.system.errors import InputError

GatherBehind = Callable[[PreTrainedModel, Site, Sequence[type[Statistic]]], Statistics]
"""Measures statistics at one site of a model whose earlier sites are pruned."""

TOLERANCE = 0.02
"""How far a layer's change may be from the sum of its consumers' outputs, as a part of it: room for bfloat16."""


def correct_in_sequence(
    model: PreTrainedModel,
    sites: Sequence[Site],
    gather: GatherBehind,
    compensators: Sequence[Compensator],
    plan: PruningPlan,
    keep: Keep = make_without_store,
) -> list[Repair]:
    """Compute the correction of every site that loses units, each after those of the sites before it.

    Args:
        model: the dense model; it stays as it is.
        sites: its sites, in the model's order.
        gather: measures statistics at one site of a model whose earlier sites are pruned.
        compensators: at most one corrects.
        plan: the units to keep.
        keep: finds what a stopped run has finished, and keeps what this one finishes.
    """
    corrector = corrector_of(compensators)
    needed = corrector.measures_in_sequence() if corrector else ()
    pruned = copy_consumers(model, sites)

    def repair(site: Site) -> Record:
        statistics = gather(pruned, site, needed) if needed else {site.name: SiteStatistics([])}
        return Repair(find_corrections(model, [site], statistics, compensators, plan)).piece()

    repairs = []
    for site in sites:
        if plan.removed_units(site):
            repairs.append(Repair.of(keep(f"repair from {site.name}", partial(repair, site))))
            mask_(pruned, [site], PruningPlan({site.name: plan.keep[site.name]}), repairs[-1].corrections)
    return repairs


def copy_consumers(model: PreTrainedModel, sites: Sequence[Site]) -> PreTrainedModel:
    """Copy a model but for its parameters, which the two share; only the consumers' are copies."""
    own = {id(parameter) for site in sites for parameter in consumer_of(model, site).parameters()}
    return copy.deepcopy(model, {id(each): each for each in model.parameters() if id(each) not in own})


class PrefixCollector(Collector):
    """Measure one site of a model whose earlier sites are pruned, with the dense model at its side.

    The target of the site's output is what would make the hidden state behind it the dense model's again: the dense
    output, and what the outputs of the sites before it lack. ``begin`` runs the dense model.

    Args:
        dense: the dense model.
        pruned: the same with its earlier sites pruned, at the dense shapes.
        sites: all sites, in the model's order.
        site: where to measure.
        statistics: what to measure, as classes.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        pruned: PreTrainedModel,
        sites: Sequence[Site],
        site: Site,
        statistics: Sequence[type[Statistic]],
    ) -> None:
        super().__init__(pruned, [site], statistics)
        self._dense = dense
        self._site = site
        self._layer = [other for other in sites if other.layer == site.layer]
        self._prefix = sites[: sites.index(site) + 1]
        self._checked = False
        self._target = self._x = torch.zeros(())

    def __enter__(self) -> PrefixCollector:
        for site in self._prefix:
            if site.expert is not None:
                raise _refused(f"{site.name} is an expert, which sees a part of the tokens")
            for model in (self._dense, self._model):
                self._handles.append(consumer_of(model, site).register_forward_hook(self._follow(model, site)))
        return self

    def begin(self, batch: Batch) -> None:
        """Run the dense model, and take note of which of a batch's tokens count."""
        super().begin(batch)
        if not self._checked:
            self._unseen = {""}
            check_outputs_are_added(self._dense, self._layer, batch)
            self._checked = True
        names = {site.name for site in self._prefix}
        self._target, self._unseen = torch.zeros(()), set(names)
        run_batch(self._dense, batch)
        self._unseen = names

    def _follow(self, model: PreTrainedModel, site: Site) -> Any:
        def hook(consumer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if model is self._dense:
                self._target = self._target.to(output.device) + output.detach().float()
            elif site is self._site:
                self._x = args[0].detach()
            else:
                self._target = self._target.to(output.device) - output.detach().float()
            self._unseen.discard(site.name)
            if self._unseen:
                return
            if model is self._model:
                self._take_in()
            raise AllSeen

        return hook

    def _take_in(self) -> None:
        """Show the site's input, and where it is asked for the target after it, to the statistics."""
        x, target = self._x.flatten(0, -2), self._target.flatten(0, -2).to(self._x.device)
        bias = getattr(consumer_of(self._model, self._site), "bias", None)
        if bias is not None:
            target = target - bias.detach()
        for statistic in self._statistics_of(self._site, x.device):
            seen = torch.cat([x.float(), target], dim=1) if isinstance(statistic, TargetGram) else x
            statistic.update(seen[self._tokens_of(statistic, x.device)])


def check_outputs_are_added(model: PreTrainedModel, layer: Sequence[Site], batch: Batch) -> None:
    """Raise ``InputError`` unless a layer adds its consumers' outputs to the hidden state, and nothing else.

    Only then is what one consumer's output lacks made good by another's. Layers that norm or scale an output before
    it is added are none of these.

    Args:
        model: the dense model.
        layer: the sites of one layer.
        batch: text to try it on.
    """
    change, added = [], []

    def see_layer(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        change.append(after.float() - before.float())

    handles = [_layer_of(model, layer[0]).register_forward_hook(see_layer, with_kwargs=True)]
    for site in layer:
        see = consumer_of(model, site).register_forward_hook(lambda module, args, output: added.append(output.float()))
        handles.append(see)
    try:
        run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    gap = change[0] - torch.stack(added).sum(dim=0)
    if gap.norm() > TOLERANCE * change[0].norm():
        raise _refused(f"layer {layer[0].layer} does more than add the outputs of its consumers to the hidden state")


def _layer_of(model: PreTrainedModel, site: Site) -> nn.Module:
    parts = site.consumer.split(".")
    if str(site.layer) not in parts:
        raise _refused(f"{site.consumer} is not below a layer {site.layer}")
    return model.get_submodule(".".join(parts[: parts.index(str(site.layer)) + 1]))


def _refused(why: str) -> InputError:
    return InputError(f"calibration.sequential: {why}; sequential calibration does not know how: leave it out")
