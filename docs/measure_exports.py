"""Measure every family in every export format: ``python docs/measure_exports.py`` writes ``docs/export-matrix.md``.

``--families llama qwen2`` measures these, and leaves the other rows of the page as they are.

Tiny random models show that forms agree, not what they are good for. It needs every extra, and half an hour. With a
real checkpoint and a text (``--checkpoint FOLDER --text FILE``) it adds the perplexity that each form gives.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import flapkit
from flapkit.checkpoint.export import export
from flapkit.checkpoint.load import load_tokenizer
from flapkit.model.surgery import Correction, apply_plan_
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.model.verify import random_plan
from flapkit.registry import ADAPTER, EXPORTER, Registry
from flapkit.system.errors import FlapkitError, InputError, ModelError

PAGE = Path(__file__).parent / "export-matrix.md"
COLUMNS: dict[str, dict[str, Any]] = {
    "hf": {},
    "hf-stock": {"pad": True},
    "gguf": {"type": "F32"},
    "onnx": {},
    "torch-export": {},
}
REAL: list[tuple[str, dict[str, Any]]] = [
    ("hf", {}),
    ("hf", {"dtype": "bfloat16"}),
    ("hf-stock", {"pad": True}),
    ("onnx", {}),
    ("torch-export", {}),
    ("gguf", {"type": "F32"}),
    ("gguf", {"type": "F16"}),
    ("gguf", {"type": "BF16"}),
    ("gguf", {"type": "Q8_0"}),
    ("gguf", {"type": "Q8_0", "pad_to": 32}),
    ("gguf", {"type": "Q4_K_M"}),
    ("compressed-tensors", {"scheme": "w8a8"}),
    ("compressed-tensors", {"scheme": "w4a16", "group_size": 64}),
    ("compressed-tensors", {"scheme": "fp8"}),
]
NOTES = """\
Which [export formats](run-the-model.md) support which family, measured on tiny random models. A number is the largest
difference of a logit from the pruned model's, as a fraction of the largest logit, in float32; each export was run by
its target program. Every consumer has a bias, as FLAP adds one, and the layers differ in width (`hf-stock` pads them
with zeros).

- `no bias`: the stock class, or llama.cpp's architecture, has no bias where pruning adds one; prune with
  `least_squares` without intercept, or with `none`.
- `no`: the format cannot represent the family. The tiny Mistral has a sliding window, and llama.cpp's `deci` has
  none.
- `fails`: the converter fails. A mixture of experts loops over the experts that the router chooses, and torch.export
  cannot trace such a loop.

Measured by `python docs/measure_exports.py`:
"""


def family_rows(registry: Registry, names: list[str]) -> Iterator[tuple[str, str]]:
    """Measure a tiny random model of each family; yield the family and its row."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                save_tiny(registry, name, Path(folder) / "pruned")
            except (FlapkitError, ValueError) as error:
                yield name, f"| {name} | cannot be built: {error} |" + " |" * (len(COLUMNS) - 1)
                continue
            cells = [cell(registry, Path(folder), kind, options) for kind, options in COLUMNS.items()]
        yield name, f"| {name} | {' | '.join(cells)} |"


def rows_of_page() -> dict[str, str]:
    """Read the rows of the page, by family."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| family ")]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def save_tiny(registry: Registry, name: str, folder: Path) -> None:
    """Save a tiny random model, pruned differently in each layer, with a bias at every consumer."""
    config = tiny_config(name)
    model = tiny_model(config)
    sites = registry.adapter_for(config).sites(config)
    plan = random_plan(sites)
    generator = torch.Generator().manual_seed(1)
    bias = {site.name: torch.randn(site.out_features, generator=generator) / 10 for site in sites}
    apply_plan_(model, sites, plan, {name: Correction(bias=value) for name, value in bias.items()})
    flapkit.save(model, folder, plan)


def cell(registry: Registry, folder: Path, kind: str, options: dict[str, Any]) -> str:
    """Export in one form; say how far it agrees, or why it cannot be."""
    exporter = registry.create(EXPORTER, kind, options)
    try:
        found = export(folder / "pruned", exporter, folder / f"out{exporter.suffix or kind}")
    except ModelError as error:
        return "no bias" if "biases" in str(error) else "no"
    except Exception as error:  # noqa: BLE001 - whatever a converter raises is what the table has to say
        return f"fails: {type(error).__name__}"
    return f"{found.relative:.0e}" if found else "?"


def real_rows(
    registry: Registry, checkpoint: Path, text: Path, formats: list[str] | None, windows: int, length: int
) -> list[str]:
    """Measure perplexity and agreement of a real checkpoint in every form, or in those of some formats."""
    tokens = torch.tensor(load_tokenizer(checkpoint)(text.read_text(encoding="utf-8")[:100_000])["input_ids"])
    parts = list(tokens[: windows * length].split(length))
    model = flapkit.load(checkpoint, "float32")
    expected = perplexity(lambda part: model(part[None]).logits[0], parts)
    columns = ("format", "size, KB", "logits differ by", "same most likely token", "greedy text", "perplexity")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows.append(f"| the pruned model | | | | | {expected:.4f} |")
    for kind, options in REAL:
        if formats and kind not in formats:
            continue
        exporter = registry.create(EXPORTER, kind, options)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"out{exporter.suffix}"
            try:
                found = export(checkpoint, exporter, path)
            except InputError as error:
                print(f"{kind} {options}: {error}", flush=True)
                continue
            assert found is not None
            with exporter.open(path) as run, torch.no_grad():
                measured = perplexity(run, parts)
            files = [path] if path.is_file() else list(path.glob("*model*"))
            size = sum(file.stat().st_size for file in files if file.suffix != ".py") / 1000
        said = ", ".join(f"{key}: {value}" for key, value in options.items())
        greedy = f"{found.greedy} of {found.continued}"
        rows.append(
            f"| {kind}{f' ({said})' if said else ''} | {size:,.0f} | {found.relative:.1e} | {found.same_top:.1%} | "
            f"{greedy} | {measured:.4f} |"
        )
        print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def perplexity(run: Any, parts: list[torch.Tensor]) -> float:
    """Exponentiate the mean cross-entropy of every token but the windows' first."""
    losses = [cross_entropy(run(part)[:-1].float(), part[1:]) for part in parts if len(part) > 1]
    return math.exp(float(torch.stack(losses).mean()))


def main() -> None:
    """Write the page, or the table of a real checkpoint to the terminal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--formats", nargs="*")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--families", nargs="*")
    asked = parser.parse_args()
    registry = Registry.load()
    if asked.checkpoint:
        rows = real_rows(registry, asked.checkpoint, asked.text, asked.formats, asked.windows, asked.length)
        print("\n".join(rows))
        return
    every = [name for name in registry.names(ADAPTER) if name not in ("auto", "vicuna")]
    rows = rows_of_page()
    head = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in family_rows(registry, asked.families or every):
        print(row, flush=True)
        rows[name] = row
        table = [*head, *(rows[family] for family in every if family in rows)]
        PAGE.write_text("\n".join(["# Families and exports", "", NOTES, *table]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
