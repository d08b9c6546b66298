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
from flapkit.model.site import Site
from flapkit.pruning.recovery import Recovery, Trainable
from flapkit.system.processes import broadcast_from_rank0

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OpenStream = Callable[[Weights | None], LayerStream]
"""Opens a checkpoint to be read layer by layer: the pruned one, or other weights of its shapes."""


class Student(Protocol):
    """A pruned model, before and after it is trained.

    Attributes:
        model: the model.
        trainable: what is trained, if it had to be put into the model as it was loaded.
        shards: the files that hold the trained model's weights already.
    """

    model: PreTrainedModel
    trainable: Trainable | None
    shards: Sequence[Path]

    def finish(self, recovered: Recovered) -> None:
        """Have the model as it shall be written and measured, once it was trained."""

    def adapter(self, recovered: Recovered) -> Mapping[str, bytes]:
        """Return what was trained as files, name -> content, and take it out of the model, where it is not merged."""


@dataclass(slots=True)
class WholeStudent:
    """A pruned model that is whole in every process.

    Args:
        model: the model.
        merge: what is trained is merged, at the end of the training already.
    """

    model: PreTrainedModel
    merge: bool
    trainable: Trainable | None = None
    shards: Sequence[Path] = ()

    def finish(self, recovered: Recovered) -> None:
        """Leave the model as the training left it."""

    def adapter(self, recovered: Recovered) -> Mapping[str, bytes]:
        """Return what was trained, and take it out of the model."""
        if self.merge:
            return {}
        files = recovered.trainable.files()
        recovered.trainable.remove_()
        return files


@dataclass(slots=True)
class ShardedStudent:
    """A pruned model of which each process has its part; what is trained is sharded with the layers it is in.

    Args:
        model: the model, with what is trained.
        sites: its sites.
        recovery: what is trained.
        folder: where the trained weights are written.
        open: opens the pruned checkpoint to be read layer by layer.
        trainable: what is trained.
    """

    model: PreTrainedModel
    sites: Sequence[Site]
    recovery: Recovery
    folder: Path
    open: OpenStream
    trainable: Trainable | None
    shards: Sequence[Path] = ()

    def finish(self, recovered: Recovered) -> None:
        """Write the weights layer by layer, with what was trained folded in; where it was, shard what was written."""
        stream = self.open(None)
        files = shards_of(self.folder, len(stream))
        broadcast_from_rank0(lambda: write_trained(stream, self.recovery, self.sites, recovered.weights, files))
        self.shards = files
        if self.recovery.merge:
            self.model = shard(self.open(Weights.of(files)))

    def adapter(self, recovered: Recovered) -> Mapping[str, bytes]:
        """Return what was trained; its files are made of a model whose layers are empty."""
        if self.recovery.merge:
            return {}
        stream = self.open(None)
        stream.model.name_or_path = self.model.name_or_path
        trainable = self.recovery.attach(stream.model, self.sites)
        fill_trained_(stream.model, recovered.weights, recovered.weights)
        return trainable.files()


def shard_student(
    open_stream: OpenStream, sites: Sequence[Site], recovery: Recovery, folder: Path, name: str
) -> ShardedStudent:
    """Load a pruned checkpoint to be trained into all processes, each its part.

    Args:
        open_stream: opens the checkpoint to be read layer by layer.
        sites: its sites.
        recovery: what will be trained.
        folder: where trained weights are written that no process holds whole.
        name: what an adapter that is saved beside the model calls it.
    """
    attached: list[Trainable] = []

    def prepare(model: PreTrainedModel) -> None:
        model.name_or_path = name
        attached.append(recovery.begin(model, sites))

    model = shard(open_stream(None), prepare)
    return ShardedStudent(model, sites, recovery, folder, open_stream, attached[0])


def write_trained(
    stream: LayerStream,
    recovery: Recovery,
    sites: Sequence[Site],
    trained: Mapping[str, Tensor],
    files: Sequence[Path],
) -> None:
    """Write a model layer by layer, with what was trained folded into it where the recovery asks for that.

    Args:
        stream: the model before it was trained.
        recovery: what was trained.
        sites: the model's sites.
        trained: name of a parameter that was trained -> its value.
        files: a file for each layer, and one for what stands outside the layers.
    """
    for index, file in zip([*range(len(stream)), None], files, strict=True):
        with nullcontext() if index is None else stream.loaded(index):
            if recovery.merge:
                trainable = recovery.attach(stream.model, sites)
                fill_trained_(stream.model, trained, [name for name in trained if stream.holds(index, name)])
                trainable.merge_()
            write_tensors(file, stream.tensors_of(index), {"format": "pt"})


def fill_trained_(model: PreTrainedModel, trained: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Give some of the parameters of what is trained their values, those without memory too."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        before = owner.get_parameter(leaf)
        device = "cpu" if before.is_meta else before.device
        setattr(owner, leaf, torch.nn.Parameter(trained[name].to(device, before.dtype)))
