"""ONNX: the pruned model for onnxruntime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flapkit.interfaces import Checkpoint, Exporter, Runner
from flapkit_exporters.hf import copy_beside
from flapkit_exporters.torch_export import traceable

MODEL = "model.onnx"


@dataclass(frozen=True)
class ONNX(Exporter):
    """A folder with the tokenizer and an ONNX model from tokens to logits: any batch and length, no cache, float32."""

    name = "onnx"
    extra = "onnx"

    @property
    def packages(self) -> Sequence[str]:
        """Onnx and onnxscript; and onnxruntime to verify the export."""
        return ["onnx", "onnxscript", "onnxruntime"] if self.verify else ["onnx", "onnxscript"]

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Trace the model with torch.export, and translate the graph."""
        model = traceable(checkpoint.folder)
        tokens = torch.zeros(2, 8, dtype=torch.long)
        with torch.no_grad(), warnings.catch_warnings():
            # torch uses deprecated functions of its own.
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            torch.onnx.export(
                model,
                (tokens,),
                path / MODEL,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}},
                dynamo=True,
                external_data=True,
                verbose=False,
            )
        copy_beside(checkpoint.folder, path, "modeling_*.py")

    @contextmanager
    def open(self, path: Path) -> Iterator[Runner]:
        """Load the model in onnxruntime, on the CPU."""
        import onnxruntime

        session = onnxruntime.InferenceSession(path / MODEL, providers=["CPUExecutionProvider"])

        def run(tokens: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"input_ids": tokens[None].numpy()})[0][0])

        yield run
