"""Evaluate a model in two processes that share its weights, and print how much memory each of them had at its peak.

```
python tests/benchmarks/sharded.py FOLDER [WAY ...]
```

The model is a random LLaMA of 24 layers and 411 million parameters in float32: 1.64 GB. Its perplexity is measured by
one process, by two of which each has the whole model (``ddp``), and by two of which each has a part
(``model_parallel``). A peak is the process's VmHWM, which counts the mapped pages of the weights' file as well, and the
libraries. glibc is told to give what is freed back to the system (MALLOC_MMAP_THRESHOLD_): it would otherwise keep what
was gathered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from random_llama import RECIPE, add_tokenizer, random_llama

TRAINERS = {
    "one": {"devices": 1},
    "ddp": {"devices": 2, "strategy": "ddp"},
    "model_parallel": {"devices": 2, "strategy": "model_parallel"},
}


def write_dense(folder: Path) -> None:
    """Write the model, and the bundled model's tokenizer."""
    random_llama(24, 1024, 4096, 16, vocabulary=4096).save_pretrained(folder, max_shard_size="100MB")
    add_tokenizer(folder)


def peaks(process: psutil.Popen) -> list[int]:
    """Wait for the end of a process and of its children, and return the peak of each in bytes, the largest first."""
    found: dict[int, int] = {}
    while process.poll() is None:
        for each in [process, *process.children(recursive=True)]:
            status = Path(f"/proc/{each.pid}/status")
            lines = status.read_text().splitlines() if status.exists() else []
            for line in lines:
                if line.startswith("VmHWM"):
                    found[each.pid] = int(line.split()[1]) * 1024
        time.sleep(0.05)
    return sorted(found.values(), reverse=True)


def main(home: Path, *ways: str) -> None:
    """Write the model unless it is there, and evaluate it in each way, or in some."""
    if not (home / "dense").is_dir():
        write_dense(home / "dense")
    size = sum(file.stat().st_size for file in (home / "dense").glob("*.safetensors"))
    print(f"weights {size / 1e9:.2f} GB")
    for name in ways or TRAINERS:
        recipe = {**RECIPE, "trainer": {"accelerator": "cpu", **TRAINERS[name]}, "output": "unused"}
        (home / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        output = home / f"{name}.json"
        output.unlink(missing_ok=True)
        arguments = ["evaluate", "dense", "--recipe", f"{name}.yaml", "--output", output.name]
        command = [sys.executable, "-m", "flapkit", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
        process = psutil.Popen(command, cwd=home, stdout=subprocess.DEVNULL, env=environment)
        shown = " and ".join(f"{peak / 1e9:.2f}" for peak in peaks(process))
        measured = json.loads(output.read_text())["perplexity"] if output.is_file() else {}
        perplexity = ", ".join(f"{figures['model']:.3f}" for figures in measured.values())
        print(f"{name}: {shown} GB, exit code {process.returncode}, perplexity {perplexity}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
