"""Hugging Face: the pruned checkpoint in another data type."""

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
    """transformers' format, with layers of different sizes and the modeling file for `trust_remote_code=True`.

    Args:
        dtype: data type of the weights.
        max_shard_size: maximum size of a weight file; larger models are split over several.
    """

    name = "hf"
    sees = True

    dtype: Annotated[DType, Field(description="Data type of the weights; `auto` is that of the checkpoint.")] = "auto"
    max_shard_size: Annotated[str, Field(description="Maximum size of a weight file.")] = "5GB"

    @property
    def tolerance(self) -> float:
        """The effect of rounding the weights to 11 or 8 bits; none if the data type is kept."""
        return {"auto": 1e-6, "float32": 1e-6, "float16": 1e-2, "bfloat16": 5e-2}[self.dtype]

    def write(self, checkpoint: Checkpoint, path: Path) -> None:
        """Write the weights in the data type, and copy all other files."""
        model = load(checkpoint.folder, self.dtype)
        model.save_pretrained(path, max_shard_size=self.max_shard_size)
        copy_beside(checkpoint.folder, path)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(model.dtype).removeprefix("torch.")
        (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @contextmanager
    def open(self, path: Path) -> Iterator[Runner]:
        """Load the folder with transformers."""
        model = load(path, "float32")

        def run(tokens: Tensor) -> Tensor:
            logits: Tensor = model(tokens[None], use_cache=False).logits[0]
            return logits

        yield run


def copy_beside(source: Path, path: Path, *but: str) -> None:
    """Copy a checkpoint's files other than weights: tokenizer, plan, recipe, model card; nothing of this machine.

    Args:
        source: the checkpoint.
        path: the folder to copy to.
        but: patterns of file names to skip.
    """
    ignored = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", "recipe.local.yaml", EXPORTS, *but)
    shutil.copytree(source, path, ignore=ignored, dirs_exist_ok=True)
