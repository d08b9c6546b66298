"""Sequential repair: one sweep over the decoder layers, in which each site also repairs the error of the earlier sites.

Two streams of hidden states pass through the layers: the dense model's, and that of the model as pruned so far. In each
layer, site by site, the consumer is fitted so that the pruned stream matches the dense one after it. The sweep costs a
few forward passes of the calibration text, regardless of the depth.

What reads the stream normalises each token first, so that errors count relative to the token. Without weights the few
tokens with massive activations (Sun et al., arXiv 2402.17762), often the first of a window, decide the fit of all; with
one over the mean square of its dense hidden state as a token's weight, they hardly count. The weight is the square root
of that: on SmolLM2-135M better than either, on a good plan.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, groups
from flapkit.model.surgery import consumer_of, mask_
from flapkit.pruning.algorithm import Repairs, find_corrections
from flapkit.pruning.collector import AllSeen, Batch, Collector, Statistics
from flapkit.pruning.components import Compensator, corrector_of
from flapkit.pruning.gram import TargetGram
from flapkit.pruning.statistics import SiteStatistics, Statistic
from flapkit.system.float64 import with_float64

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 0.02
"""Largest difference of a layer's change from the sum of its consumers' outputs, relative to the change; it allows for
bfloat16."""

SMALLEST = 1e-12
"""Smallest mean square of a hidden state, so that a state of zeros has a weight."""

log = logging.getLogger(__name__)


class Runner(Protocol):
    """Runs the decoder layers of a model one at a time: ``flapkit.execution.stream.LayerRunner``."""

    model: PreTrainedModel
    layers: Any

    def __len__(self) -> int:
        """Return the number of layers."""

    def loaded(self, index: int) -> AbstractContextManager[nn.Module]:
        """Hold a layer's weights in memory."""

    def embed(self, batch: Batch) -> Tensor:
        """Return the input of the first layer, [windows, tokens, hidden]."""

    def step(self, index: int, batch: Batch, hidden: Tensor) -> Tensor:
        """Run one layer, [windows, tokens, hidden]."""


class Hidden(Protocol):
    """The hidden states of all batches between two layers: ``flapkit.execution.stream.HiddenStates``."""

    def __getitem__(self, batch: int) -> Tensor:
        """Return those of a batch, [windows, tokens, hidden]."""

    def put(self, batch: int, hidden: Tensor) -> None:
        """Store a layer's output for a batch; it is read after ``advance``."""

    def advance(self) -> None:
        """Move on: all batches have gone through the layer."""

    def clear(self) -> None:
        """Remove all hidden states."""


class LayerRepair:
    """The repair of one loaded decoder layer.

    Args:
        runner: runs the layer.
        index: index of the layer.
        sites: its sites.
        batches: the calibration text.
        dense: hidden states of the dense model before the layer.
        pruned: hidden states of the pruned model before the layer.
        targets: site name -> where the targets of its fit are stored.

    Attributes:
        adds: whether the layer adds its consumers' outputs to the hidden state, and nothing else.
        masked: whether the plan is applied to any site of the layer.
    """

    def __init__(
        self,
        runner: Runner,
        index: int,
        sites: Sequence[Site],
        batches: Sequence[Batch],
        dense: Hidden,
        pruned: Hidden,
        targets: Mapping[str, Hidden],
    ) -> None:
        self._runner = runner
        self._index = index
        self._sites = sites
        self._batches = batches
        self._dense = dense
        self._pruned = pruned
        self._targets = targets
        self.adds = True
        self.masked = False

    def run_dense(self) -> None:
        """Run the dense layer, and store the target that each consumer's output is fitted to.

        The target of a consumer is its dense output plus the difference between the dense and the pruned stream before
        it. This holds in layers that add their consumers' outputs to the hidden state unchanged. In other layers (those
        that normalise or scale an output, experts) the target is the dense consumer's output alone.
        """
        sites = [site for site in self._sites if not site.stacked]
        outputs: dict[str, Tensor] = {}
        with follow_outputs(self._runner.model, sites, outputs):
            for number, batch in enumerate(self._batches):
                before = self._dense[number]
                after = self._runner.step(self._index, batch, before)
                if number == 0:
                    self.adds = len(sites) == len(self._sites) and adds_outputs(before, after, outputs.values())
                total = before.to(after.device).float()
                for site in sites:
                    total = total + outputs[site.name].float() if self.adds else outputs[site.name].float()
                    self._targets[site.name].put(number, total)
                self._dense.put(number, after)
        for target in self._targets.values():
            target.advance()

    def repair(self, compensators: Sequence[Compensator], plan: PruningPlan) -> Repairs:
        """Compute the corrections of the layer's sites one after another; each site is masked before the next."""
        corrector = corrector_of(compensators)
        repairs = Repairs()
        for together in groups(self._sites):
            if not plan.removed_units(together[0]):
                continue
            statistics = self._measure(together, corrector)
            corrections = find_corrections(self._runner.model, together, statistics, compensators, plan)
            repairs = repairs.merged(Repairs(corrections))
            self.mask_(together, plan, repairs)
        return repairs

    def mask_(self, sites: Sequence[Site], plan: PruningPlan, repairs: Repairs) -> None:
        """Zero the removed channels of some of the layer's sites, and correct the rest; call it once per site."""
        mask_(self._runner.model, sites, plan.only(sites), repairs.corrections)
        self.masked = True

    def run_pruned(self) -> None:
        """Run the layer as pruned so far."""
        for number, batch in enumerate(self._batches):
            self._pruned.put(number, self._runner.step(self._index, batch, self._pruned[number]))

    def _measure(self, sites: Sequence[Site], corrector: Compensator | None) -> Statistics:
        """Measure a site, or the experts of a layer, in the pruned stream."""
        fits_targets = not sites[0].stacked
        needed: tuple[type[Statistic], ...] = ()
        if corrector is not None:
            needed = corrector.measures_in_sequence() if fits_targets else corrector.measures()
        if not needed or sites[0].kind == "mixture":
            return {site.name: SiteStatistics([]) for site in sites}
        earlier = self._sites[: self._sites.index(sites[0])] if self.adds else []
        outputs: dict[str, Tensor] = {}
        collector = TargetCollector(self._runner.model, sites, needed)
        with follow_outputs(self._runner.model, earlier, outputs), collector:
            for number, batch in enumerate(self._batches):
                before = self._pruned[number]
                collector.begin(batch)
                if fits_targets:
                    collector.aim(self._targets[sites[0].name][number], before if self.adds else None, outputs)
                with suppress(AllSeen):
                    self._runner.step(self._index, batch, before)
                collector.check()
            collector.merge()
        return collector.statistics


class TargetCollector(Collector):
    """Measures the inputs of consumers in the pruned stream, with targets for their outputs."""

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site], statistics: Sequence[type[Statistic]]) -> None:
        super().__init__(model, sites, statistics, stop_early=True)
        self._target: Tensor | None = None
        self._before: Tensor | None = None
        self._earlier: Mapping[str, Tensor] = {}

    def aim(self, target: Tensor, before: Tensor | None, earlier: Mapping[str, Tensor]) -> None:
        """Set the target of the site's output for a batch.

        Args:
            target: the dense stream after the site, [windows, tokens, out_features]; or the dense consumer's output.
            before: the pruned stream before the layer; None where the target is the consumer's output.
            earlier: outputs of the layer's earlier consumers in the pruned stream; filled in as the layer runs.
        """
        self._target, self._before, self._earlier = target, before, earlier

    def _see(self, site: Site, x: Tensor, output: Tensor, routed: Tensor | None) -> None:
        if self._target is None:
            super()._see(site, x, output, routed)
            return
        x = with_float64(x.detach())
        target = self._target.to(x.device)
        if self._before is not None:
            target = target - self._before.to(x.device).float()
            for other in self._earlier.values():
                target = target - other.to(x.device).float()
        bias = getattr(consumer_of(self._model, site), "bias", None)
        if bias is not None:
            target = target - bias.detach().to(x.device)
        rows = torch.cat([x.float(), target.flatten(0, -2)], dim=1)
        weights = self._target.to(x.device).flatten(0, -2).square().mean(dim=1).clamp(min=SMALLEST).rsqrt()
        for statistic in self._statistics_of(site, x.device):
            tokens = self._tokens_of(statistic, x.device)
            if isinstance(statistic, TargetGram):
                statistic.update(rows[tokens], weights[tokens])
            else:
                statistic.update(x[tokens])
        self._leave_when_seen(site)


@contextmanager
def follow_outputs(model: PreTrainedModel, sites: Sequence[Site], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Store the latest output of each site's consumer: site name -> [windows, tokens, out_features]."""

    def keep(name: str) -> Any:
        def hook(consumer: nn.Module, args: Any, output: Tensor) -> None:
            outputs[name] = output.detach()

        return hook

    handles = [consumer_of(model, site).register_forward_hook(keep(site.name)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def adds_outputs(before: Tensor, after: Tensor, outputs: Any) -> bool:
    """Tell whether a layer adds its consumers' outputs to the hidden state, and nothing else.

    Args:
        before: the layer's input, [windows, tokens, hidden].
        after: its output, of the same shape.
        outputs: the outputs of its consumers, of the same shape.
    """
    change = after.float() - before.to(after.device).float()
    added = torch.stack([output.float() for output in outputs]).sum(dim=0)
    return added.shape == change.shape and bool((change - added).norm() <= TOLERANCE * change.norm())


@contextmanager
def layer_copied(runner: Runner, index: int, sites: Sequence[Site]) -> Iterator[None]:
    """Run a copy of a loaded layer, whose sites can be masked, and put the dense layer back at the end."""
    layer = runner.layers[index]
    runner.layers[index] = copy_layer(runner.model, layer, sites)
    try:
        yield
    finally:
        runner.layers[index] = layer


def copy_layer(model: PreTrainedModel, layer: nn.Module, sites: Sequence[Site]) -> nn.Module:
    """Copy a layer; the copy has its own consumers, and shares all other parameters with the original."""
    own = {id(parameter) for site in sites for parameter in consumer_of(model, site).parameters()}
    shared: dict[int, Any] = {id(weight): weight for weight in layer.parameters() if id(weight) not in own}
    return copy.deepcopy(layer, {**shared, id(model.config): model.config})
