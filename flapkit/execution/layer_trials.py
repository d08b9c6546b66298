"""Try plans on a model of which one decoder layer at a time is in memory.

A trial is a sweep over the layers with the held-out windows. Several plans share a sweep: each layer is read once, and
every plan gets a copy of it, masked and repaired. The repaired consumers are on the disk (``Supernet``), so that a site
is repaired once for each set of kept units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flapkit.execution.executor import digest_of, record_of, repairs_of
from flapkit.execution.record_files import write_record
from flapkit.execution.resume import read_finished
from flapkit.execution.stream import HiddenStates, LayerStream, step_all, walk
from flapkit.model.plan import PruningPlan
from flapkit.model.site import Site, by_layer, groups
from flapkit.model.surgery import Correction, mask_
from flapkit.pruning.algorithm import Repairs
from flapkit.pruning.collector import Batch
from flapkit.pruning.sequential import layer_copied
from flapkit.pruning.trials import Judge
from flapkit.system.processes import broadcast_from_rank0

CorrectLoaded = Callable[[Sequence[Site], PruningPlan], Mapping[str, Correction]]
"""Computes the corrections of some sites of the loaded layer for a plan: site name -> correction."""


class Supernet:
    """The repaired consumers of a search, on the disk: those of a site for each set of units that plans kept.

    Args:
        folder: where they are; those of an interrupted run are used.
        limit: bytes on the disk; the least recently used ones are removed.
        correct: computes corrections.
    """

    def __init__(self, folder: Path, limit: float, correct: CorrectLoaded) -> None:
        self._folder = folder
        self._limit = limit
        self._correct = correct
        # A resumed run uses them in another order; that decides only which of them are computed twice.
        self._sizes = {path: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}

    def corrections(self, sites: Sequence[Site], plan: PruningPlan) -> dict[str, Correction]:
        """Return the corrections of the sites of a loaded layer, which is dense."""
        found: dict[str, Correction] = {}
        for together in groups(sites):
            if plan.removed_units(together[0]):
                path = (
                    self._folder
                    / f"{together[0].name.replace('/', '_')}-{digest_of([plan.only(together)])}.safetensors"
                )
                broadcast_from_rank0(partial(self._ensure, path, together, plan))
                found |= repairs_of(read_finished(path)).corrections
        return found

    def _ensure(self, path: Path, sites: Sequence[Site], plan: PruningPlan) -> None:
        """Compute and write corrections that are not on the disk; make room for them by removing others."""
        if (known := self._sizes.pop(path, None)) is None:
            record = record_of(Repairs(self._correct(sites, plan)))
            needed = sum(tensor.nbytes for tensor in record.tensors.values())
            while self._sizes and sum(self._sizes.values()) + needed > self._limit:
                oldest = next(iter(self._sizes))
                oldest.unlink()
                del self._sizes[oldest]
            write_record(path, record)
            known = path.stat().st_size
        self._sizes[path] = known


class LayerTrials:
    """Evaluates plans in sweeps over the layers, several plans in each.

    Args:
        stream: the dense model.
        sites: its sites.
        kind: what is minimised.
        windows: the trial windows, in batches.
        supernet: the repaired consumers.
        hidden: creates a store of hidden states, given its name.
    """

    def __init__(
        self,
        stream: LayerStream,
        sites: Sequence[Site],
        kind: Literal["perplexity", "kl"],
        windows: Sequence[Batch],
        supernet: Supernet,
        hidden: Callable[[str], HiddenStates],
    ) -> None:
        self._stream = stream
        self._layers = by_layer(sites)
        self._supernet = supernet
        self._hidden = hidden
        dense = hidden("trial-dense")
        if kind == "kl":
            for index in walk(stream, dense):
                step_all(stream, index, windows, dense)
        self._judge = Judge(kind, windows, self._running(windows, dense))
        dense.clear()

    @torch.no_grad()
    def __call__(self, plans: Sequence[PruningPlan], share: float = 1.0) -> list[float]:
        """Return what the judge says of each plan's model.

        Args:
            plans: the units to keep.
            share: of the windows.
        """
        windows = self._judge.first(share)
        with ExitStack() as cleared:
            states = [self._hidden(f"trial-{number}") for number in range(len(plans))]
            for hidden in states:
                cleared.callback(hidden.clear)
            for index in range(len(self._stream)):
                self._step(index, plans, states, windows)
            return [self._judge(self._running(windows, hidden), share) for hidden in states]

    def _step(
        self, index: int, plans: Sequence[PruningPlan], states: Sequence[HiddenStates], windows: Sequence[Batch]
    ) -> None:
        """Load a layer, and run every plan's copy of it."""
        stream, sites = self._stream, self._layers.get(index, [])
        with stream.loaded(index):
            for plan, hidden in zip(plans, states, strict=True):
                corrections = self._supernet.corrections(sites, plan)
                with layer_copied(stream, index, sites):
                    mask_(stream.model, sites, plan.only(sites), corrections)
                    step_all(stream, index, windows, hidden)
                hidden.advance()

    def _running(self, windows: Sequence[Batch], hidden: HiddenStates) -> Callable[[int], Tensor]:
        return lambda number: self._stream.logits(windows[number], hidden[number])
