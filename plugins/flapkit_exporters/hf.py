"""Hugging Face: the pruned checkpoint itself, in a type of one's choice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor

from flapkit.interfaces import EXPORTS, Checkpoint, DType, Exporter, Runner, load


@dataclass(frozen=True)
class HuggingFace(Exporter):
    """transformers' own form, layer by layer of its own size, with its code for `trust_remote_code=True`.

    Args:
        dtype: type of the weights.
        max_shard_size: weights beyond this size are split over several files.
    """

    name = "hf"

    dtype: Annotated[DType, Field(description="Type of the weights; `auto` is the checkpoint's own.")] = "auto"
    max_shard_size: Annotated[str, Field(description="Weights beyond this size go into several files.")] = "5GB"

    @property
    def tolerance(self) -> float:
        """Rounding the weights to 8 or 11 bits moves the logits; keeping them moves nothing."""
        return {"auto": 1e-6, "float32": 1e-6, "float16": 1e-2, "bfloat16": 5e-2}[self.dtype]

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write the checkpoint again, with all that lies beside its weights."""
        model = load(checkpoint.folder, self.dtype)
        model.save_pretrained(path, max_shard_size=self.max_shard_size)
        copy_beside(checkpoint.folder, path)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(model.dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @contextmanager
    def open(self, path: Path) -> Iterator[Runner]:
        """Load it through transformers."""
        model = load(path, "float32")

        def run(tokens: Tensor) -> Tensor:
            logits: Tensor = model(tokens[None], use_cache=False).logits[0]
            return logits

        yield run


def copy_beside(source: Path, path: Path, *but: str) -> None:
    """Copy what lies beside a checkpoint's weights: tokenizer, plan, recipe, model card.

    Args:
        source: the checkpoint.
        path: the folder to copy to.
        but: patterns of names to leave out.
    """
    ignored = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", EXPORTS, *but)
    shutil.copytree(source, path, ignore=ignored, dirs_exist_ok=True)
