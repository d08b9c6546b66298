"""torch.export: the pruned model as a graph that runs without transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flapkit.interfaces import Checkpoint, Exporter, Runner, load


class Logits(nn.Module):
    """A language model as a function from tokens to logits, without KV cache.

    Args:
        model: a transformers causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute logits [batch, tokens, vocabulary] of tokens [batch, tokens]."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def traceable(folder: Path) -> Logits:
    """Load a checkpoint in float32 for tracing: experts run as batched products, not as a data-dependent loop."""
    model = load(folder, "float32")
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")
    return Logits(model)


@dataclass(frozen=True)
class TorchExport(Exporter):
    """An ExportedProgram (`.pt2`) from tokens to logits: any batch and length, no cache, float32."""

    name = "torch-export"
    suffix = ".pt2"

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Trace the model with dynamic batch size and length, and save the program."""
        model = traceable(checkpoint.folder)
        tokens = torch.zeros(2, 8, dtype=torch.long)
        shapes = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
        with torch.no_grad():
            torch.export.save(torch.export.export(model, (tokens,), dynamic_shapes=shapes), path)

    @contextmanager
    def open(self, path: Path) -> Iterator[Runner]:
        """Load the program."""
        module = torch.export.load(path).module()

        def run(tokens: Tensor) -> Tensor:
            logits: Tensor = module(tokens[None])[0]
            return logits

        yield run
