"""Shard a model over the processes of a run: each holds a part of every weight, and no process ever the whole model.

The sharding is PyTorch's own (FSDP2, ``torch.distributed.fsdp.fully_shard``), a group of weights for each decoder layer
and one for what stands outside them. In a forward pass every process gathers a layer when its turn comes, and gives the
others' parts back behind it; therefore all processes have to run equally many forward passes.

```python
model = shard(LayerStream(config, open_weights(path), "model.layers", device=device))
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flapkit.execution.stream import LayerStream
from flapkit.model.surgery import copy_sharing_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(stream: LayerStream, prepare: Callable[[PreTrainedModel], object] | None = None) -> PreTrainedModel:
    """Load a model into the processes of a run, which have met already: each keeps its part of every weight.

    A decoder layer at a time is read and sharded. What the stream holds outside the layers stays in memory for as long
    as the stream does.

    Args:
        stream: the model.
        prepare: puts more into the model before it is sharded, such as low-rank updates. Its layers' weights hold
            nothing then, but for their shapes, types and device.

    Returns:
        The model; no weight of the checkpoint's is trained.
    """
    model = copy_sharing_weights(stream.model, ()).requires_grad_(False)
    layers = list(model.get_submodule(stream.path).children())
    # Whatever wraps a module later, it is still the one that holds the weight.
    owners = [{name: _owner(layer, name) for name, _ in layer.named_parameters()} for layer in layers]
    if prepare is not None:
        for layer, holders in zip(layers, owners, strict=True):
            for name, parameter in list(layer.named_parameters()):
                _put(
                    *holders[name], torch.zeros((), dtype=parameter.dtype, device=stream.device).expand(parameter.shape)
                )
        prepare(model)
    mesh = init_device_mesh(stream.device.type, (torch.distributed.get_world_size(),))
    for index, (layer, holders) in enumerate(zip(layers, owners, strict=True)):
        with stream.loaded(index) as loaded:
            for name, parameter in loaded.named_parameters():
                _put(*holders[name], parameter.detach())
        fully_shard(layer, mesh=mesh)
    # Behind the model as well: what stands outside the layers would otherwise stay whole in every process.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _put(owner: nn.Module, leaf: str, value: Tensor) -> None:
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole, on its own device: a sharded one is gathered, in every process at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill_(parameter: Tensor, value: Tensor) -> None:
    """Write a whole value into a parameter: of a sharded one each process writes its part."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
