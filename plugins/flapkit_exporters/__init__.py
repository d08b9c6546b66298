"""flapkit's own exporters."""

from __future__ import annotations

from collections.abc import Iterable

from flapkit import hookimpl
from flapkit.interfaces import Exporter
from flapkit_exporters.gguf_file import GGUF
from flapkit_exporters.hf import HuggingFace
from flapkit_exporters.hf_stock import HuggingFaceStock
from flapkit_exporters.onnx_file import ONNX
from flapkit_exporters.quantised import CompressedTensors
from flapkit_exporters.torch_export import TorchExport


@hookimpl
def flapkit_exporters() -> Iterable[type[Exporter]]:
    """Offer the default exporters."""
    return [CompressedTensors, GGUF, HuggingFace, HuggingFaceStock, ONNX, TorchExport]
