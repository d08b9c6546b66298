"""Measure models and their quantised forms: ``python docs/measure_quantised.py --text FILE MODEL ...``.

The first model is the dense one, the others are pruned. It prints a table: size on disk, perplexity, and the speed in
each program. A form whose exporter is not installed is left out and named; without its program, the cells of its speed
stay empty (vLLM runs in the environment of ``make test-serve``). A perplexity is of the form's own logits: llama.cpp's
for GGUF, and for W8A8 those of transformers, which computes with the rounded weights and inputs. A speed is that of
``flapkit bench``, one model after the other; a machine that does something else at the same time spoils it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measure_exports import perplexity

import flapkit
from flapkit.checkpoint.export import check_packages, export
from flapkit.checkpoint.load import load_config, load_tokenizer
from flapkit.evaluation.speed import Workload
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import apply_plan_
from flapkit.registry import EXPORTER, Registry
from flapkit.run.bench import bench
from flapkit.system.errors import FlapkitError

FORMS: list[tuple[str, str, dict[str, Any]]] = [
    ("transformers", "hf", {"dtype": "float32"}),
    ("transformers", "hf", {"dtype": "bfloat16"}),
    ("vllm", "hf", {"dtype": "bfloat16"}),
    ("vllm", "compressed-tensors", {"scheme": "w8a8", "dtype": "bfloat16"}),
    ("llama.cpp", "gguf", {"type": "F16"}),
    ("llama.cpp", "gguf", {"type": "Q8_0"}),
    ("llama.cpp", "gguf", {"type": "Q4_K_M"}),
]
"""Program, format and its options."""

COLUMNS = ("model", "format", "size, MB", "perplexity", "program", "prefill, tokens/s", "decode, tokens/s")


@contextmanager
def as_checkpoint(model: str) -> Iterator[Path]:
    """Give a folder that can be exported: a dense model is saved as one that lost nothing."""
    if hasattr(load_config(model), "flapkit"):
        yield Path(model)
        return
    with tempfile.TemporaryDirectory() as folder:
        dense = flapkit.load(model, "float32")
        sites = flapkit.sites(dense)
        apply_plan_(dense, sites, PruningPlan({site.name: tuple(range(site.units)) for site in sites}), {})
        flapkit.save(dense, Path(folder) / "dense", tokenizer=load_tokenizer(model))
        yield Path(folder) / "dense"


def size_of(path: Path) -> int:
    """Return the bytes of a GGUF file, or of a folder's weights."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def rows(name: str, checkpoint: Path, parts: list[torch.Tensor], workload: Workload) -> Iterator[str]:
    """Measure a model in every form."""
    registry = Registry.load()
    for engine, kind, options in FORMS:
        # Perplexity runs the form, and so needs what verifying it needs.
        check, exporter = (registry.create(EXPORTER, kind, {**options, "verify": verify}) for verify in (True, False))
        said = f"{kind} ({', '.join(map(str, options.values()))})"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"out{exporter.suffix}"
            try:
                check_packages(check)
                export(checkpoint, exporter, path)
                size = size_of(path)
                with exporter.open(path) as run, torch.no_grad():
                    measured = perplexity(run, parts)
            except FlapkitError as error:
                print(f"{name}, {said}: {error}", flush=True)
                continue
            speeds = ["", ""]
            try:
                speed = bench(str(path), None, workload, engine=engine, device="cpu").speeds[str(path)]
                speeds = [f"{speed.prefill.median:,.1f}", f"{speed.decode.median:,.1f}"]
            except FlapkitError as error:
                print(f"{name}, {said} in {engine}: {error}", flush=True)
        yield f"| {' | '.join([name, said, f'{size / 1e6:,.1f}', f'{measured:.3f}', engine, *speeds])} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, required=True, help="text to measure perplexity on")
    parser.add_argument("--windows", type=int, default=40, help="windows of it")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt whose prefill is timed")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--repetitions", type=int, default=5, help="timed turns")
    asked = parser.parse_args()
    workload = Workload(1, asked.prompt, asked.tokens, asked.repetitions)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for model in asked.models:
        with as_checkpoint(model) as checkpoint:
            tokens = torch.tensor(load_tokenizer(model)(asked.text.read_text(encoding="utf-8")[:200_000])["input_ids"])
            parts = list(tokens[: asked.windows * asked.length].split(asked.length))
            for row in rows(Path(os.path.normpath(model)).name, checkpoint, parts, workload):
                lines.append(row)
                print(row, flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
