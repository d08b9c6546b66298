"""The pruned model that a recovery trains: whole in every process, or sharded over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from flapkit.checkpoint.weights import Weights, write_tensors
from flapkit.execution.layerwise import shards_of
from flapkit.execution.shards import shard
from flapkit.execution.stream import LayerStream
from flapkit.execution.training import Recovered
from flapkit.model.precision import convert, round_
from flapkit.model.site import Site
from flapkit.pruning.recovery import Recovery, Trainable
from flapkit.system.processes import broadcast_from_rank0

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OpenStream = Callable[[Weights | None], LayerStream]
"""Opens a checkpoint to be read layer by layer: the pruned one (None), or other weights of its shapes."""


class Student(Protocol):
    """A pruned model, before and after it is trained.

    Attributes:
        model: the model.
        trainable: the trainable part, if it was attached when the model was loaded.
        shards: the files that already hold the trained model's weights.
    """

    model: PreTrainedModel
    trainable: Trainable | None
    shards: Sequence[Path]

    def finish(self, recovered: Recovered) -> None:
        """Bring the trained model into the form in which it is written and measured."""

    def adapter(self, recovered: Recovered) -> Mapping[str, bytes]:
        """Return the trained part as files, name -> content, and remove it from the model; empty if it is merged."""


@dataclass(slots=True)
class WholeStudent:
    """A pruned model that is whole in every process.

    Args:
        model: the model.
        merge: the trained part is merged at the end of the training.
        saved: dtype of the written weights.
    """

    model: PreTrainedModel
    merge: bool
    saved: torch.dtype
    trainable: Trainable | None = None
    shards: Sequence[Path] = ()

    def finish(self, recovered: Recovered) -> None:
        """Round merged weights to those that the checkpoint will hold."""
        if self.merge and self.saved != self.model.dtype:
            round_(self.model, self.saved)

    def adapter(self, recovered: Recovered) -> Mapping[str, bytes]:
        """Return the trained part, and remove it from the model."""
        if self.merge:
            return {}
        files = recovered.trainable.files()
        recovered.trainable.remove_()
        return files


@dataclass(slots=True)
class ShardedStudent:
    """A pruned model that is sharded over the processes; the trainable part is sharded with its layers.

    Args:
        model: the model, with the trainable part.
        sites: its sites.
        recovery: the recovery.
        folder: where the trained weights are written.
        open: opens the pruned checkpoint to be read layer by layer.
        saved: dtype of the written weights.
        trainable: the trainable part.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    recovery: Recovery
    folder: Path
    open: OpenStream
    saved: torch.dtype
    trainable: Trainable | None
    shards: Sequence[Path] = ()

    def finish(self, recovered: Recovered) -> None:
        """Write the weights layer by layer; if the recovery merges, load and shard the merged weights."""
        stream = self.open(None)
        files = shards_of(self.folder, len(stream))
        broadcast_from_rank0(
            lambda: write_trained(stream, self.recovery, self.sites, recovered.weights, files, self.saved)
        )
        self.shards = files
        if self.recovery.merge:
            self.model = shard(self.open(Weights.of(files)))

    def adapter(self, recovered: Recovered) -> Mapping[str, bytes]:
        """Return the trained part; its files are built from a model whose layers are not loaded."""
        if self.recovery.merge:
            return {}
        stream = self.open(None)
        stream.model.name_or_path = self.model.name_or_path
        trainable = self.recovery.attach(stream.model, self.sites)
        fill_trained_(stream.model, recovered.weights, recovered.weights)
        return trainable.files()


def shard_student(
    open_stream: OpenStream, sites: Sequence[Site], recovery: Recovery, folder: Path, name: str, saved: torch.dtype
) -> ShardedStudent:
    """Load a pruned checkpoint for training, sharded over all processes.

    Args:
        open_stream: opens the checkpoint to be read layer by layer.
        sites: its sites.
        recovery: the recovery.
        folder: where the trained weights are written.
        name: name of the base model in an adapter that is saved beside it.
        saved: dtype of the written weights.
    """
    attached: list[Trainable] = []

    def prepare(model: PreTrainedModel) -> None:
        model.name_or_path = name
        attached.append(recovery.begin(model, sites))

    model = shard(open_stream(None), prepare)
    return ShardedStudent(model, sites, recovery, folder, open_stream, saved, attached[0])


def write_trained(
    stream: LayerStream,
    recovery: Recovery,
    sites: Sequence[Site],
    trained: Mapping[str, Tensor],
    files: Sequence[Path],
    saved: torch.dtype,
) -> None:
    """Write a model layer by layer, with the trained part merged if the recovery merges.

    Args:
        stream: the model before training.
        recovery: the recovery.
        sites: the model's sites.
        trained: name of a trained parameter -> its value.
        files: one file per layer, and one for the weights outside the layers.
        saved: dtype of the written weights.
    """
    for index, file in zip([*range(len(stream)), None], files, strict=True):
        with nullcontext() if index is None else stream.loaded(index):
            if recovery.merge:
                trainable = recovery.attach(stream.model, sites)
                fill_trained_(stream.model, trained, [name for name in trained if stream.holds(index, name)])
                trainable.merge_()
            tensors = dict(convert(stream.model, stream.tensors_of(index), saved))
            write_tensors(file, tensors, {"format": "pt"})


def fill_trained_(model: PreTrainedModel, trained: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Set some of the trained parameters, including those on the meta device, to their values."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        before = owner.get_parameter(leaf)
        device = "cpu" if before.is_meta else before.device
        setattr(owner, leaf, torch.nn.Parameter(trained[name].to(device, before.dtype)))
