"""Calibration: run text through the dense model, and measure what its consumers see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from inspect import signature
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from flapkit.model.site import Site
from flapkit.model.spread import embeddings_device
from flapkit.model.surgery import check_sites, consumer_of
from flapkit.pruning.experts import See, SeeMixture, unwatch, watch
from flapkit.pruning.statistics import GradientStatistic, LayerStatistic, SiteStatistics, Statistic
from flapkit.system.errors import CalibrationError
from flapkit.system.float64 import float64_device, with_float64

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]
"""``input_ids`` [windows, tokens]; perhaps ``attention_mask`` of the same shape; ``held_out`` and ``counted``."""

COUNTED = "counted"
"""Which windows of a batch count; the others run through the model so that processes that wait for each other can."""

Statistics = Mapping[str, SiteStatistics]
"""Site name -> what was measured there."""


class AllSeen(Exception):  # noqa: N818 - no error: it ends a forward pass whose rest nobody needs
    """All sites were seen in a forward pass."""


class Collector:
    """Measure statistics at the consumers while calibration batches run, as a context manager.

    Call ``begin`` before, and ``check`` after, each batch that runs through the model. The hooks are gone when the
    context is left, whatever happened.

    Args:
        model: the dense model.
        sites: where to measure.
        statistics: what to measure, as classes.
        stop_early: leave each forward pass when all sites were seen in it; ``run_batch`` takes care of that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        statistics: Sequence[type[Statistic]],
        *,
        stop_early: bool = False,
    ) -> None:
        self.statistics: Statistics = {
            site.name: SiteStatistics([statistic.of(site) for statistic in statistics]) for site in sites
        }
        self._model = model
        self._sites = sites
        self._attended = self._held_out = torch.empty(0)
        self._complete = False
        self._handles: list[RemovableHandle] = []
        self._watched: list[nn.Module] = []
        of_layers = any(issubclass(statistic, LayerStatistic) for statistic in statistics)
        self._stop_early = stop_early and not needs_gradient(statistics) and not of_layers
        self._layers = {site.layer_path: site.layer for site in sites} if of_layers else {}
        self._before: Tensor | None = None
        self._outputs: dict[str, Tensor | None] = {}
        self._unseen: set[str] = set()

    def __enter__(self) -> Collector:
        check_sites(self._model, self._sites)
        stacks: dict[nn.Module, list[Site]] = {}
        for site in self._sites:
            consumer = consumer_of(self._model, site)
            if site.stacked:
                stacks.setdefault(consumer, []).append(site)
            else:
                self._handles.append(consumer.register_forward_hook(self._hook(site)))
        for path in self._layers:
            layer = self._model.get_submodule(path)
            self._handles.append(layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._layer_hook(self._layers[path])))
        for module, sites in stacks.items():
            self._watched.append(module)
            experts = {site.expert: site for site in sites if site.expert is not None}
            mixture = next((site for site in sites if site.expert is None), None)
            watch(module, self._watcher(experts), self._mixture_watcher(mixture) if mixture else None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._watched:
            unwatch(module)
        self._watched.clear()

    def begin(self, batch: Batch) -> None:
        """Take note of which of a batch's tokens count."""
        self._attended = attended(batch)
        if COUNTED in batch:
            self._attended = self._attended & batch[COUNTED][:, None]
        self._complete = bool(self._attended.all())
        self._held_out = batch.get("held_out", torch.zeros(len(self._attended))).to(self._attended.device).bool()
        self._unseen = {site.name for site in self._sites}

    def check(self) -> None:
        """Raise ``CalibrationError``, which names the first layer, if anything measured so far is not finite."""
        for site in self._sites:
            if not all(statistic.is_finite() for statistic in self.statistics[site.name].values()):
                raise CalibrationError(
                    f"{site.consumer}: its input is not finite on the calibration text; "
                    "try model.dtype float32 or bfloat16, and check that the model's weights are sound"
                )

    def merge(self) -> None:
        """Merge what the processes of the run measured, each on its own windows; every one of them has to call it."""
        for site in self._sites:
            device = float64_device(next(consumer_of(self._model, site).parameters()).device)
            for statistic in self.statistics[site.name].values():
                # What saw nothing here, such as an expert, still lies where it was made.
                statistic.to(device)
                statistic.merge_()

    def _hook(self, site: Site) -> Any:
        def hook(consumer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # Where accelerate spreads the model, the input may come from another device than the weights'.
            self._see(site, args[0].flatten(0, -2).to(output.device), output, None)

        return hook

    def _watcher(self, sites: Mapping[int, Site]) -> See:
        def see(expert: int, x: Tensor, output: Tensor, routed: Tensor) -> None:
            if expert in sites:
                self._see(sites[expert], x, output, routed)

        return see

    def _mixture_watcher(self, site: Site) -> SeeMixture:
        def see(contributions: Tensor) -> None:
            x = with_float64(contributions)
            for statistic in self._statistics_of(site, x.device):
                if not isinstance(statistic, (GradientStatistic, LayerStatistic)):
                    statistic.update(x[self._tokens_of(statistic, x.device)])
            if self._layers:
                self._outputs[site.name] = None
            self._leave_when_seen(site)

        return see

    def _enter_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Store a layer's input [windows, tokens, hidden]."""
        self._before = args[0] if args else kwargs["hidden_states"]
        self._outputs.clear()

    def _layer_hook(self, index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            after = (output[0] if isinstance(output, tuple) else output).detach()
            assert self._before is not None
            before = self._before.detach().to(after.device)
            for site in self._sites:
                if site.layer != index or site.name not in self._outputs:
                    continue
                own = self._outputs[site.name]
                for statistic in self._statistics_of(site, after.device):
                    if isinstance(statistic, LayerStatistic):
                        tokens = self._tokens_of(statistic, after.device)
                        seen = (None if x is None else x.flatten(0, -2)[tokens] for x in (before, after, own))
                        statistic.update(*seen)  # type: ignore[arg-type]

        return hook

    def _see(self, site: Site, x: Tensor, output: Tensor, routed: Tensor | None) -> None:
        """Show a consumer's input [tokens, channels] to the statistics; of an expert, that of the routed tokens."""
        x = with_float64(x.detach())
        if self._layers:
            self._outputs[site.name] = output.detach() if routed is None else None
        for statistic in self._statistics_of(site, x.device):
            if isinstance(statistic, LayerStatistic):
                continue
            tokens = self._tokens_of(statistic, x.device, routed)
            if not isinstance(statistic, GradientStatistic):
                statistic.update(x[tokens])
            elif output.requires_grad:
                output.register_hook(_see_gradient(statistic, x, tokens))
        self._leave_when_seen(site)

    def _leave_when_seen(self, site: Site) -> None:
        """Leave the forward pass where nothing behind this site is measured."""
        self._unseen.discard(site.name)
        if self._stop_early and not self._unseen:
            raise AllSeen

    def _statistics_of(self, site: Site, device: torch.device) -> Iterator[Statistic]:
        """Yield a site's statistics, on the device of its input."""
        for statistic in self.statistics[site.name].values():
            yield statistic.to(device)

    def _tokens_of(self, statistic: Statistic, device: torch.device, routed: Tensor | None = None) -> Tensor | slice:
        """Return an index of the tokens that a statistic takes in: of all, or of those routed to an expert."""
        if self._complete and statistic.windows == "all":
            # No copy is made then: it would cost as much as the moments themselves.
            return slice(None)
        chosen = {"all": torch.ones_like(self._held_out), "fitted": ~self._held_out, "held_out": self._held_out}
        counted = self._attended & chosen[statistic.windows][:, None]
        tokens = counted.flatten().to(device)
        return tokens if routed is None else tokens[routed]


def _see_gradient(statistic: GradientStatistic, x: Tensor, tokens: Tensor | slice) -> Any:
    def hook(gradient: Tensor) -> None:
        statistic.update(x[tokens], with_float64(gradient.flatten(0, -2))[tokens])

    return hook


def attended(batch: Batch) -> Tensor:
    """Tell which tokens of a batch are no padding, bool [windows, tokens]."""
    tokens = batch["input_ids"]
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(tokens, dtype=torch.bool)


def needs_gradient(statistics: Iterable[type[Statistic]]) -> bool:
    """Tell whether calibration has to run a backward pass."""
    return any(issubclass(statistic, GradientStatistic) for statistic in statistics)


def run_batch(model: PreTrainedModel, batch: Batch, *, gradient: bool = False) -> None:
    """Run a calibration batch: the decoder layers alone, without logits; with a backward pass where it is asked for.

    Args:
        model: the dense model.
        batch: goes to the device of the model's embeddings.
        gradient: run the summed cross-entropy of the next token and its backward pass as well. No parameter keeps a
            gradient.
    """
    device = embeddings_device(model)
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch}
    if gradient:
        _backward(model, inputs)
    else:
        with torch.no_grad(), suppress(AllSeen):
            _run_layers(model, inputs)


def _run_layers(model: PreTrainedModel, inputs: Batch) -> None:
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule):
        model.base_model(**inputs, use_cache=False)
        return
    # Only where the whole model is called, its processes gather what stands outside the layers.
    fewest = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    model(**inputs, use_cache=False, **fewest)


@torch.enable_grad()
def _backward(model: PreTrainedModel, inputs: Batch) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    # With frozen weights, the gradients of the layers' outputs hang on the embedded tokens.
    embedded = model.get_input_embeddings().register_forward_hook(lambda *seen: seen[2].requires_grad_())
    try:
        logits = model(**inputs, use_cache=False).logits
        targets = torch.where(attended(inputs), inputs["input_ids"], -100)[:, 1:].to(logits.device)
        functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum").backward()
    finally:
        embedded.remove()
        for parameter in trained:
            parameter.requires_grad_()


def measure(
    model: PreTrainedModel,
    sites: Sequence[Site],
    statistics: Sequence[type[Statistic]],
    batches: Iterable[Batch],
    *,
    stop_early: bool = False,
) -> Statistics:
    """Run calibration batches through the model and measure the consumers' inputs.

    Args:
        model: the dense model, in evaluation mode.
        sites: where to measure.
        statistics: what to measure, as classes.
        batches: mappings with ``input_ids`` [windows, tokens], and perhaps ``attention_mask`` of the same shape and
            ``held_out`` [windows].
        stop_early: leave each forward pass after the last of the sites.

    Raises:
        CalibrationError: an input that is not finite, or no text at all.
    """
    gradient = needs_gradient(statistics)
    with Collector(model, sites, statistics, stop_early=stop_early) as collector:
        for batch in batches:
            collector.begin(batch)
            run_batch(model, batch, gradient=gradient)
            collector.check()
    return collector.statistics
