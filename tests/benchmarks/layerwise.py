"""Prune a model that is larger than the memory that it may have: layer by layer it goes, whole it does not.

```
python tests/benchmarks/layerwise.py FOLDER
python tests/benchmarks/layerwise.py FOLDER --shape llama2-70b --layers 14 --gigabytes 10 --mode layerwise
```

The model has random weights and the shape of TinyLlama-1.1B (22 layers, float32, 4.4 GB), or as many layers as the disk
holds of Llama-2-70B (bfloat16, 1.7 GB each). Runs are held to an address space of so many gigabytes by RLIMIT_AS, which
counts all that the process maps, the libraries' 2.2 GB included; ``--force`` lets the whole one begin nevertheless.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from accelerate import init_empty_weights
from random_llama import RECIPE, add_tokenizer
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from flapkit.checkpoint.weights import INDEX, Weights

CHANGES = {
    "calibration": {"dataset": "stdlib", "samples": 8, "length": 32, "batch_size": 8},
    "evaluate": {"perplexity": [{"dataset": "stdlib", "length": 32, "windows": 4}]},
    "trainer": {"accelerator": "cpu"},
}

MODES = ("layerwise", "whole")
SHAPES = {
    "tinyllama": {
        "dtype": "float32",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama2-70b": {
        "dtype": "bfloat16",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def write_dense(folder: Path, config: LlamaConfig) -> None:
    """Write the model, a file for each layer, so that this process never holds it either."""
    config.architectures = ["LlamaForCausalLM"]
    with init_empty_weights():
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    add_tokenizer(folder)
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        parts.setdefault(name.split(".")[2] if ".layers." in name else name, {})[name] = shape
    torch.manual_seed(0)
    for number, part in enumerate(parts.values()):
        tensors = {name: torch.empty(shape, dtype=config.dtype) for name, shape in part.items()}
        for tensor in tensors.values():
            tensor.fill_(1) if tensor.dim() == 1 else tensor.normal_(std=0.02)
        save_file(tensors, folder / f"model-{number:05}.safetensors", metadata={"format": "pt"})
    (folder / INDEX).write_text(Weights.of(sorted(folder.glob("*.safetensors"))).index())


def prune(home: Path, mode: str, limit: int) -> None:
    """Run the recipe in a process of its own, and print what came of it."""
    (home / f"{mode}.yaml").write_text(
        yaml.safe_dump({**RECIPE, **CHANGES, "execution": mode, "output": f"pruned-{mode}"})
    )
    command = [
        sys.executable,
        "-m",
        "flapkit",
        "run",
        f"{mode}.yaml",
        "--quiet",
        "--no-cache",
        "--overwrite",
        "--force",
    ]
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=home,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert process.stderr is not None
    said = process.stderr.read().strip().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    print(
        f"{mode}: exit code {code}, {time.perf_counter() - began:.0f} s, resident peak {usage.ru_maxrss / 1e6:.2f} GB"
    )
    if code:
        print(f"  {said[-1] if said else 'nothing said'}")
        return
    result = json.loads((home / f"pruned-{mode}" / "result.json").read_text())
    print(f"  parameters {result['params']['dense']:,} -> {result['params']['pruned']:,}")
    print(f"  seconds {result['seconds']}")


def main() -> None:
    """Write the model unless it is there, and prune it both ways."""
    parser = argparse.ArgumentParser(description="Prune a model that is larger than the memory that it may have.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--layers", type=int, help="how many layers; as many as the shape has if not given")
    parser.add_argument("--gigabytes", type=float, default=3.5, help="address space that a run may have")
    parser.add_argument("--mode", choices=MODES, nargs="+", default=MODES)
    asked = parser.parse_args()
    dense, shape = asked.folder / "dense", SHAPES[asked.shape]
    if not (dense / INDEX).is_file():
        write_dense(dense, LlamaConfig(**{**shape, "num_hidden_layers": asked.layers or shape["num_hidden_layers"]}))
    size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    print(f"weights {size / 1e9:.2f} GB, address space {asked.gigabytes:.2f} GB")
    for mode in asked.mode:
        prune(asked.folder, mode, int(asked.gigabytes * 1e9))


if __name__ == "__main__":
    main()
