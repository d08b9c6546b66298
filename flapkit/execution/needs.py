"""What executors need: memory, disk, and passes over the calibration text, computed from sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flapkit.execution.stream import layers_of
from flapkit.model.site import Site, by_layer
from flapkit.pruning.algorithm import Method
from flapkit.pruning.components import TrialSearcher, corrector_of
from flapkit.pruning.gram import Gram
from flapkit.pruning.statistics import size_of, split_by_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SWEEP_PASSES = 4
"""Forward passes of a sweep: the dense layer, one to measure each of two sites in the pruned layer, and the result."""

SWEEP_STREAMS = 4
"""Hidden states that a sweep stores: those of the dense and of the pruned model, and the targets of two sites."""

SUPERNETS = 8
"""How often the disk holds the consumers of all sites in a search layer by layer, repaired for different plans."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The work of an executor, as far as it is known before the weights are read.

    Args:
        model: the dense model on the meta device, in the dtype in which it will run.
        sites: its sites.
        method: the components.
        removed: parameters that the budget removes.
        tokens: tokens whose hidden states go through the layers together.
        memory: bytes of statistics at a time.
        sequential: repair in one sweep over the layers.
        hidden_on_disk: store hidden states on the disk if layers run one at a time.
        working: bytes of batches, logits and other data in memory beside the weights.
        processes: how many processes share the windows.
        saved: dtype of the written weights; by default the model's.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    method: Method
    removed: int
    tokens: int
    memory: int
    sequential: bool = False
    hidden_on_disk: bool = False
    working: int = 0
    processes: int = 1
    saved: torch.dtype | None = None

    @property
    def weights(self) -> int:
        """Bytes of the dense weights."""
        return self.model.num_parameters() * self.model.dtype.itemsize

    @property
    def pruned_weights(self) -> int:
        """Bytes of the pruned weights."""
        return self.weights - self.removed * self.model.dtype.itemsize

    @property
    def written_weights(self) -> int:
        """Bytes of the pruned weights on the disk."""
        return self.pruned_weights // self.model.dtype.itemsize * (self.saved or self.model.dtype).itemsize

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states of all windows that go through the layers together."""
        width = int(self.model.config.get_text_config().hidden_size) * self.model.dtype.itemsize
        return self.tokens * width * (SWEEP_STREAMS if self.sequential else 1)

    @property
    def statistics(self) -> int:
        """Bytes of the most statistics that are in memory together, and of the solution of one correction."""
        sites, method, memory = self.sites, self.method, self.memory
        # Least squares copies its products: those of all, of the fitted and of the held-out windows.
        solving = 3 * max(size_of(method.repairing, [site]) for site in sites)
        if not self.sequential and size_of(method.statistics, sites) <= memory:
            return size_of(method.statistics, sites) + solving
        parts = [(method.scoring, part) for part in split_by_memory(sites, method.scoring, memory)]
        if self.sequential:
            corrector = corrector_of(method.compensators)
            in_sequence = corrector.measures_in_sequence() if corrector else ()
            parts += [(in_sequence, [site]) for site in sites]
        else:
            parts += [(method.repairing, part) for part in split_by_memory(sites, method.repairing, memory)]
        return max(size_of(statistics, part) for statistics, part in parts) + solving

    @property
    def layer_statistics(self) -> int:
        """Bytes of a layer's statistics, as far as a search layer by layer has them in memory together."""
        if not self.method.judges:
            return 0
        return max(size_of(self.method.statistics, in_layer) for in_layer in by_layer(self.sites).values())

    @property
    def search_files(self) -> int:
        """Bytes that a search layer by layer writes: the statistics of all sites, and repaired consumers."""
        if not isinstance(self.method.searcher, TrialSearcher) or not self.removed:
            return 0
        return size_of(self.method.repairing, self.sites) + supernet_size(self.sites, self.model.dtype.itemsize)

    @property
    def waiting_weights(self) -> int:
        """Bytes of corrected weights that stay in memory until all are computed."""
        corrected = [site for site in self.sites if site.kind != "mixture"]
        consumers = sum(site.channels * site.out_features for site in corrected) * self.model.dtype.itemsize
        return consumers * (int(Gram in self.method.repairing) + int(self.sequential))

    @property
    def layers(self) -> tuple[int, int]:
        """Bytes of the weights outside the decoder layers, and of the largest layer.

        Raises:
            ModelError: the sites are not in a list of layers.
        """
        path = f"{layers_of(self.sites)}."
        outer, layers = 0, dict[str, int]()
        for name, parameter in self.model.named_parameters():
            if name.startswith(path):
                index = name.removeprefix(path).partition(".")[0]
                layers[index] = layers.get(index, 0) + parameter.nbytes
            else:
                outer += parameter.nbytes
        return outer, max(layers.values())

    @property
    def passes(self) -> int:
        """How often the calibration text runs through the model, if every site loses units."""
        sites, method, memory = self.sites, self.method, self.memory
        if not self.sequential and size_of(method.statistics, sites) <= memory:
            # A search that judges plans has measured the others' windows alone.
            return int(bool(method.statistics)) + int(method.judges and bool(method.repairing))
        scoring = len(split_by_memory(sites, method.scoring, memory)) if method.scoring else 0
        if self.sequential:
            return scoring + SWEEP_PASSES
        return scoring + (len(split_by_memory(sites, method.repairing, memory)) if method.repairing else 0)


@dataclass(frozen=True, slots=True)
class Needs:
    """What an executor needs for a workload, in each process, beyond Python and its libraries.

    Args:
        memory: resident peak, in bytes.
        least: the part of it that cannot be reclaimed: the system can drop pages of the dense weights' file.
        disk: the most bytes written.
    """

    memory: int
    least: int
    disk: int


def supernet_size(sites: Sequence[Site], itemsize: int) -> int:
    """Return the most bytes of the repaired consumers of a search layer by layer.

    Args:
        sites: the model's sites.
        itemsize: bytes of each number of the weights.
    """
    repaired = [site for site in sites if site.kind != "mixture"]
    return SUPERNETS * itemsize * sum((site.channels + 1) * site.out_features for site in repaired)
