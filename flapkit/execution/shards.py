"""Shard a model over the processes of a run: every process holds a part of each weight, and never the whole model.

The sharding is PyTorch's (FSDP2, ``torch.distributed.fsdp.fully_shard``), with one group of weights per decoder layer
and one for the weights outside the layers. In a forward pass every process gathers a layer before it runs, and frees
the other parts afterwards. All processes must therefore run the same number of forward passes.

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
    """Load a model into the processes of a run: every process keeps its part of each weight.

    The process group must be initialised. One decoder layer at a time is read and sharded. The stream's weights outside
    the layers stay in memory as long as the stream.

    Args:
        stream: the model.
        prepare: adds to the model before it is sharded, such as LoRA adapters. At that time the layers' weights have
            shapes, dtypes and a device, but no values.

    Returns:
        The model; the checkpoint's weights are frozen.
    """
    model = copy_sharing_weights(stream.model, ()).requires_grad_(False)
    layers = list(model.get_submodule(stream.path).children())
    # ``prepare`` may wrap modules; these are the ones that hold the weights.
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
    # Reshard after the forward pass as well: the weights outside the layers would otherwise stay whole everywhere.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _put(owner: nn.Module, leaf: str, value: Tensor) -> None:
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def gathered(tensor: Tensor) -> Tensor:
    """Return a whole tensor on its device; a sharded one is gathered, which all processes must do together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill_(parameter: Tensor, value: Tensor) -> None:
    """Write a whole value into a parameter; if it is sharded, every process writes its part."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)
