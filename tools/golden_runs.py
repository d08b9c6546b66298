"""Golden runs: small recipes of every kind, whose plans, weights and perplexities must survive a change of the code.

```
python tools/golden_runs.py record golden.json
python tools/golden_runs.py compare golden.json
```

Each run is a process of its own, of the flapkit that ``python -m flapkit`` finds; nothing of flapkit is imported here.
``record`` keeps of each run the hash of its plan, the names, types and shapes of its tensors, the hash of its weights
and its perplexities; its output stays beside the file. ``compare`` runs all again, and exits with 1 if anything
differs: weights by more than ``--tolerance``, or a run that ``--allow`` does not name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

CALIBRATION = {"dataset": "stdlib", "split": "train", "samples": 16, "length": 64, "batch_size": 4}
LARGER = {**CALIBRATION, "samples": 48}
EVALUATE = {"perplexity": [{"dataset": "stdlib", "split": "heldout", "length": 64, "windows": 8, "batch_size": 4}]}
BASE: dict[str, Any] = {
    "model": {"path": "builtin:tiny-llama", "dtype": "float32"},
    "calibration": CALIBRATION,
    "metric": "wifv",
    "searcher": "al_am",
    "compensator": "bias",
    "budget": {"ratio": 0.2},
    "evaluate": EVALUATE,
    "trainer": {"accelerator": "cpu", "devices": 1},
}
DDP = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
LORA = {"name": "lora", "steps": 6, "batch_size": 2, "length": 32, "validate_every": 3, "validation_windows": 4}
METRICS = ("ifv", "kfac", "magnitude", "obs", "random", "taylor", "trace", "wanda_sp", "wifn")

RUNS: dict[str, dict[str, Any]] = {
    "whole": {},
    "half": {"budget": {"ratio": 0.5}},
    "layerwise": {"execution": "layerwise"},
    "ddp": {"trainer": DDP},
    "layerwise-ddp": {"execution": "layerwise", "trainer": DDP},
    "least-squares": {"compensator": "least_squares", "calibration": LARGER},
    "least-squares-layerwise": {"compensator": "least_squares", "calibration": LARGER, "execution": "layerwise"},
    "least-squares-passes": {
        "compensator": "least_squares",
        "calibration": {**LARGER, "statistics_memory": "9MB"},
    },
    "no-intercept": {"compensator": {"name": "least_squares", "intercept": False}, "calibration": LARGER},
    "sequential": {"compensator": "least_squares", "calibration": {**LARGER, "sequential": True}},
    "mixtral": {"model": {"path": "tiny-mixtral", "dtype": "float32"}},
    "mixtral-layerwise": {"model": {"path": "tiny-mixtral", "dtype": "float32"}, "execution": "layerwise"},
    "query-heads": {
        "model": {"path": "tiny-gqa", "dtype": "float32"},
        "adapter": {"name": "llama", "unit": "query_head"},
    },
    "multiple-of": {"budget": {"ratio": 0.3, "multiple_of": 32}},
    "ul_um": {"searcher": "ul_um"},
    "al_mm": {"searcher": {"name": "al_mm", "heads": 0.5}},
    "ul_mm": {"searcher": {"name": "ul_mm", "heads": 1}},
    "per_parameter": {"searcher": "per_parameter"},
    "optuna": {"searcher": {"name": "optuna", "trials": 4}},
    "lora": {"compensator": ["bias", LORA]},
    **{f"metric-{name}": {"metric": name} for name in METRICS},
}
SWEEP = {
    "recipe": "base.yaml",
    "grid": {"budget.ratio": [0.2, 0.4], "compensator": ["none", "bias"]},
    "output": "sweep",
}


def make_models(folder: Path) -> None:
    """Write tiny random models with the bundled model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    found = "import flapkit.checkpoint as c, pathlib; print(pathlib.Path(c.__file__).parents[1])"
    package = Path(
        subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True).stdout.strip()
    )
    tokenizer = AutoTokenizer.from_pretrained(next(package.rglob("tiny-llama")))
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**sizes, "num_key_value_heads": 2})).save_pretrained(folder / "tiny-gqa")
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **experts)).save_pretrained(folder / "tiny-mixtral")
    for name in ("tiny-gqa", "tiny-mixtral"):
        tokenizer.save_pretrained(folder / name)


def run_one(name: str, folder: Path) -> dict[str, Any]:
    """Run one recipe, or the sweep, and return what is compared."""
    command = ["sweep", "sweep.yaml"] if name == "sweep" else ["run", f"{name}.yaml", "--no-cache"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FLAPKIT_CACHE": str(folder / f"cache-{name}")}
    shutil.rmtree(folder / name, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "flapkit", *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        return {"failed": done.stderr[-2000:]}
    if name == "sweep":
        rows = map(json.loads, (folder / "sweep" / "results.jsonl").read_text().splitlines())
        return {"rows": {json.dumps(row["settings"], sort_keys=True): row["perplexity"] for row in rows}}
    output = folder / name
    tensors = read_weights(output)
    described = [(key, str(value.dtype), tuple(value.shape)) for key, value in tensors.items()]
    weights = hashlib.sha256()
    for key, value in tensors.items():
        weights.update(key.encode() + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    result = json.loads((output / "result.json").read_text())
    return {
        "plan": hashlib.sha256((output / "plan.json").read_bytes()).hexdigest(),
        "tensors": hashlib.sha256(repr(described).encode()).hexdigest(),
        "weights": weights.hexdigest(),
        "perplexity": dict(result["perplexity"]),
        "params": result["params"],
    }


def read_weights(output: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a checkpoint, sorted by name."""
    tensors: dict[str, torch.Tensor] = {}
    for file in output.glob("*.safetensors"):
        tensors |= load_file(file)
    return dict(sorted(tensors.items()))


def numbers(values: Any, key: str = "") -> dict[str, float]:
    """Gather the numbers of a tree of mappings by dotted keys."""
    if isinstance(values, Mapping):
        return {name: number for k, v in values.items() for name, number in numbers(v, f"{key}.{k}").items()}
    return {key: float(values)} if isinstance(values, (int, float)) and not isinstance(values, bool) else {}


def run_all(names: list[str], jobs: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Run recipes, some at a time."""
    make_models(folder)
    (folder / "base.yaml").write_text(yaml.safe_dump({**BASE, "output": "base"}))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    for name, changes in RUNS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**BASE, **changes, "output": name}))
    with ThreadPoolExecutor(jobs) as pool:
        results = {}
        for name, result in zip(names, pool.map(lambda name: run_one(name, folder), names), strict=True):
            print(f"{name}: {'failed' if 'failed' in result else 'ran'}", flush=True)
            results[name] = result
    return results


def differences(before: dict[str, Any], after: dict[str, Any], old: Path, new: Path, tolerance: float) -> list[str]:
    """Say in what two results of a run differ."""
    if "failed" in after or "failed" in before:
        return [] if before.keys() == after.keys() else [f"failed: {after.get('failed', before.get('failed'))}"]
    changed = [key for key in ("plan", "tensors") if before.get(key) != after.get(key)]
    if before.get("weights") != after.get("weights") and "tensors" not in changed:
        mine, theirs = read_weights(old), read_weights(new)
        apart = max(float((mine[key].double() - theirs[key].double()).abs().max()) for key in mine)
        if apart > tolerance:
            changed.append(f"weights by {apart:.1e}")
    was, now = numbers(before), numbers(after)
    changed += [
        f"{key[1:]}: {was.get(key)} -> {now.get(key)}"
        for key in sorted({*was, *now})
        if abs(was.get(key, float("inf")) - now.get(key, 0)) > max(1e-6, tolerance) * abs(was.get(key, 1))
    ]
    return changed


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="*", help="names of runs; all by default, and others stay as recorded")
    parser.add_argument("--allow", nargs="*", default=[], help="runs that may differ")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest difference of a weight that passes")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    names = arguments.only or [*RUNS, "sweep"]
    kept = arguments.file.with_suffix("").absolute()
    if arguments.what == "record":
        if arguments.only is None:
            shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True, exist_ok=True)
        results = run_all(names, arguments.jobs, kept)
        known = json.loads(arguments.file.read_text()) if arguments.only and arguments.file.is_file() else {}
        arguments.file.write_text(json.dumps({**known, **results}, indent=2) + "\n")
        failed = [name for name, result in results.items() if "failed" in result]
        for name in failed:
            print(f"{name}: {results[name]['failed']}")
        return int(bool(failed))
    before, bad = json.loads(arguments.file.read_text()), []
    with tempfile.TemporaryDirectory() as made:
        after = run_all(names, arguments.jobs, Path(made))
        for name in names:
            changed = differences(before[name], after[name], kept / name, Path(made) / name, arguments.tolerance)
            print(f"{name}: {'; '.join(changed) if changed else 'equal'}")
            if changed and name not in arguments.allow:
                bad.append(name)
    print(f"{len(names) - len(bad)} of {len(names)} as before")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
