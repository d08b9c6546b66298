"""Golden runs: small recipes of every kind, whose plans, weights and perplexities must survive a change of the code.

```
python tools/golden_runs.py record golden.json
python tools/golden_runs.py compare golden.json
```

Each run is a process of its own, of the flapkit that ``python -m flapkit`` finds; nothing of flapkit is imported here.
The first line printed says which that is.

``record`` keeps of each run the hash of its plan, the names, types and shapes of its tensors, the hash of its weights,
its parameters and its perplexities; of the sweep its rows. Recipes, texts, models and outputs stay in a folder: beside
the file, or where ``--keep`` says.

``compare`` runs the recipes of that folder again, so that a later change of this script changes nothing, and prints a
table. It exits with 1 if anything differs in a run that ``--allow`` does not name: a number by more than one part in a
million, a weight by more than ``--tolerance``. What a file does not record of a run is not compared. With ``--only``
the other runs of a file stay as recorded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

TRAIN = ("argparse", "ast", "calendar", "configparser", "difflib")
HELDOUT = ("textwrap", "statistics")
"""Modules of the standard library whose sources are the texts: short, for a run would read all of it for 10 s."""

CALIBRATION = {"dataset": "./train.txt", "samples": 16, "length": 64, "batch_size": 4}
LARGER = {**CALIBRATION, "samples": 48}
EVALUATE = {"perplexity": [{"dataset": "./heldout.txt", "length": 64, "windows": 8, "batch_size": 4}]}
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
    "mixtral": {"model": {"path": "./tiny-mixtral", "dtype": "float32"}},
    "mixtral-layerwise": {"model": {"path": "./tiny-mixtral", "dtype": "float32"}, "execution": "layerwise"},
    "query-heads": {
        "model": {"path": "./tiny-gqa", "dtype": "float32"},
        "adapter": {"name": "llama", "unit": "query_head"},
    },
    "multiple-of": {"budget": {"ratio": 0.3, "multiple_of": 32}},
    "ul_um": {"searcher": "ul_um"},
    "al_mm": {"searcher": {"name": "al_mm", "heads": 0.5}},
    "ul_mm": {"searcher": {"name": "ul_mm", "heads": 1}},
    "per_parameter": {"searcher": "per_parameter"},
    "plan": {"searcher": {"name": "plan", "path": "by-hand.json"}},
    "optuna": {"searcher": {"name": "optuna", "trials": 12}},
    "lora": {"compensator": ["bias", LORA]},
    **{f"metric-{name}": {"metric": name} for name in METRICS},
}
SWEEP = {
    "recipe": "base.yaml",
    "grid": {"budget.ratio": [0.2, 0.4], "compensator": ["none", "bias"]},
    "output": "sweep",
}
INPUTS = ("*.yaml", "*.txt", "by-hand.json", "tiny-*")
FIELDS = ("plan", "tensors", "weights", "params", "perplexity", "rows", "errors")
PATIENCE = 600.0
"""Seconds after which a run is stopped, and counts as failed."""
CLOSE = 1e-6
"""Relative difference up to which two perplexities are equal."""


def package() -> Path:
    """Find the folder of the flapkit that is run."""
    found = "import importlib.util; print(importlib.util.find_spec('flapkit').origin)"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", found]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip()).parent


def make_models(folder: Path, bundled: Path) -> None:
    """Write tiny random models with the bundled model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(bundled)
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
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    MixtralForCausalLM(MixtralConfig(**sizes, **experts)).save_pretrained(folder / "tiny-mixtral")
    for name in ("tiny-gqa", "tiny-mixtral"):
        tokenizer.save_pretrained(folder / name)


def make_plan(folder: Path, bundled: Path) -> float:
    """Write a plan by hand: every fourth neuron goes, and the first head of every second layer.

    Returns:
        the ratio of the block parameters that it removes.
    """
    config = json.loads((bundled / "config.json").read_text())
    layers, hidden, width = (int(config[key]) for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    heads, groups = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    size = hidden // heads
    keep = {f"layers.{layer}.mlp": [unit for unit in range(width) if unit % 4] for layer in range(layers)}
    keep |= {f"layers.{layer}.attention": list(range(1, groups)) for layer in range(0, layers, 2)}
    (folder / "by-hand.json").write_text(json.dumps({"keep": keep}))
    neuron, group = 3 * hidden, 2 * hidden * size * (heads // groups + 1)
    removed = sum(
        (width - len(kept)) * neuron if name.endswith("mlp") else (groups - len(kept)) * group
        for name, kept in keep.items()
    )
    return removed / (layers * (width * neuron + groups * group))


def make_inputs(folder: Path, names: Sequence[str]) -> None:
    """Write recipes, and the texts and models that they name."""
    bundled = next(package().rglob("tiny-llama"))
    library = Path(sysconfig.get_path("stdlib"))
    for file, modules in (("train.txt", TRAIN), ("heldout.txt", HELDOUT)):
        text = "\n".join((library / f"{module}.py").read_text(encoding="utf-8") for module in modules)
        (folder / file).write_text(text, encoding="utf-8")
    make_models(folder, bundled)
    ratio = make_plan(folder, bundled)
    for name in names:
        if name == "sweep":
            (folder / "base.yaml").write_text(yaml.safe_dump({**BASE, "output": "base"}))
            (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
            continue
        recipe = {**BASE, **RUNS[name], "output": name}
        if name == "plan":
            recipe["budget"] = {"ratio": round(ratio, 6)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))


def copy_inputs(kept: Path, folder: Path) -> None:
    """Copy what a recording ran."""
    for path in (path for pattern in INPUTS for path in kept.glob(pattern)):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copy(path, folder / path.name)


def run_flapkit(name: str, folder: Path) -> str | None:
    """Run one recipe, or the sweep, with no statistics but its own.

    Returns:
        what it said if it failed, else None.
    """
    command = ["sweep", "sweep.yaml"] if name == "sweep" else ["run", f"{name}.yaml", "--no-cache"]
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "FLAPKIT_CACHE": str(folder / f"cache-{name}")}
    for old in (folder / name, folder / f"cache-{name}"):
        shutil.rmtree(old, ignore_errors=True)
    log = folder / f"{name}.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "flapkit", *command],
            cwd=folder,
            env={**os.environ, **own},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {PATIENCE:.0f} s\n{log.read_text()[-2000:]}"
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    return log.read_text()[-2000:] if code else None


def run_one(name: str, folder: Path) -> dict[str, Any]:
    """Run one recipe, or the sweep, and return what is compared."""
    begun = time.monotonic()
    said = run_flapkit(name, folder)
    result: dict[str, Any] = {"failed": said} if said is not None else sweep_result(folder) if name == "sweep" else {}
    if not result:
        result = run_result(folder / name)
    seconds = round(time.monotonic() - begun, 1)
    print(f"{name}: {'failed' if 'failed' in result else 'ran'} in {seconds:.0f} s", flush=True)
    return {**result, "seconds": seconds}


def sweep_result(folder: Path) -> dict[str, Any]:
    """Read a sweep's rows, without times."""
    rows = [json.loads(row) for row in (folder / "sweep" / "results.jsonl").read_text().splitlines()]
    columns = {"rows": "perplexity", "params": "params", "errors": "error"}
    return {
        field: {json.dumps(row["settings"], sort_keys=True): row[column] for row in rows}
        for field, column in columns.items()
    }


def run_result(output: Path) -> dict[str, Any]:
    """Read a run's output."""
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


def run_all(names: Sequence[str], jobs: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Run recipes, some at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(names, pool.map(lambda name: run_one(name, folder), names), strict=True))


def leaves(values: Any, key: str = "") -> dict[str, Any]:
    """Gather what a tree of mappings holds by dotted keys."""
    if isinstance(values, Mapping):
        return {
            name: leaf for k, v in values.items() for name, leaf in leaves(v, f"{key}.{k}" if key else str(k)).items()
        }
    return {key: values}


def value_differences(before: Any, after: Any, tolerance: float) -> list[str]:
    """Say which of two trees' values differ; floats may differ a little."""
    was, now = leaves(before), leaves(after)
    changed = []
    for key in sorted({*was, *now}):
        old, new = was.get(key), now.get(key)
        if isinstance(old, float) and isinstance(new, float):
            if old == new or abs(old - new) <= max(CLOSE, tolerance) * abs(old):
                continue
            changed.append(f"{key}: {old!r} -> {new!r}, relative {abs(old - new) / max(abs(old), 1e-300):.1e}")
        elif old != new or (key in was) != (key in now):
            changed.append(f"{key}: {old!r} -> {new!r}")
    return changed


def compare_one(
    before: dict[str, Any], after: dict[str, Any], old: Path, new: Path, tolerance: float
) -> tuple[dict[str, str], list[str]]:
    """Compare two results of a run.

    Args:
        before: what was recorded.
        after: what was run now.
        old: the recorded run's output, if it was kept.
        new: the output now.
        tolerance: largest difference of a weight that passes.

    Returns:
        a word for each field that was recorded, and in what the results differ.
    """
    failed = [
        f"{when}: {result['failed']}" for when, result in (("then", before), ("now", after)) if "failed" in result
    ]
    if failed:
        return {}, [f"failed {line}" for line in failed]
    cells, changed = {}, []
    for field in FIELDS:
        if field not in before:
            continue
        if field == "weights" and before[field] != after[field]:
            mine, theirs = read_weights(old), read_weights(new)
            shapes = [{key: value.shape for key, value in tensors.items()} for tensors in (mine, theirs)]
            if not mine or shapes[0] != shapes[1]:
                cells[field] = "differs"
                changed.append("weights: other tensors" if mine else f"weights: no checkpoint is kept in {old}")
                continue
            apart = {key: float((mine[key].double() - theirs[key].double()).abs().max()) for key in mine}
            most = max(apart, key=lambda key: apart[key])
            cells[field] = f"by {apart[most]:.1e}"
            count = sum(value > 0 for value in apart.values())
            if not apart[most] <= tolerance:
                changed.append(f"weights by {apart[most]:.1e} in {most}; {count} of {len(apart)} tensors differ")
            continue
        found = value_differences(before[field], after.get(field), tolerance)
        cells[field] = "differs" if found else "equal"
        changed += [f"{field} {line}".strip() if isinstance(before[field], Mapping) else field for line in found]
    return cells, changed


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def record(file: Path, kept: Path, names: Sequence[str], jobs: int, partly: bool) -> int:
    """Run recipes, and write what came out."""
    known = json.loads(file.read_text()) if partly and file.is_file() else {}
    if not partly:
        shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True, exist_ok=True)
    make_inputs(kept, names)
    results = run_all(names, jobs, kept)
    file.write_text(json.dumps({**known, **results}, indent=2) + "\n")
    failed = [name for name, result in results.items() if "failed" in result]
    for name in failed:
        print(f"{name}: {results[name]['failed']}")
    return int(bool(failed))


def compare(recorded: dict[str, Any], kept: Path, names: Sequence[str], jobs: int, allow: set[str], near: float) -> int:
    """Run recipes again, and print what differs: of each run when it is done, and of all as a table."""
    with tempfile.TemporaryDirectory() as made, ThreadPoolExecutor(jobs) as pool:
        folder = Path(made)
        copy_inputs(kept, folder)

        def again(name: str) -> tuple[list[str], bool]:
            after = run_one(name, folder)
            cells, changed = compare_one(recorded[name], after, kept / name, folder / name, near)
            allowed = " (allowed)" if name in allow else ""
            for line in changed:
                print(f"{name}{allowed}: {line}", flush=True)
            failed = "failed" in after or "failed" in recorded[name]
            words = ["failed" if failed else cells.get(field, "-") for field in FIELDS]
            return [name, *words, f"{after['seconds']:.0f}"], not changed or name in allow

        rows, passed = zip(*pool.map(again, names), strict=True)
    print_table([["run", *FIELDS, "seconds"], *rows])
    print(f"{sum(passed)} of {len(names)} as before, or allowed to differ")
    return int(not all(passed))


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs; all by default")
    parser.add_argument("--allow", nargs="+", default=[], metavar="NAME", help="runs that may differ")
    parser.add_argument("--tolerance", type=float, default=0.0, help="largest difference of a weight that passes")
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="folder of recipes and outputs; by default FILE less .json"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    file: Path = arguments.file
    kept = (arguments.keep or file.with_suffix("")).absolute()
    if arguments.what == "record":
        known, names = [*RUNS, "sweep"], arguments.only or [*RUNS, "sweep"]
    else:
        recorded = json.loads(file.read_text())
        known, names = list(recorded), arguments.only or list(recorded)
    unknown = sorted({*names, *arguments.allow} - {*known})
    if unknown:
        parser.error(f"no such runs: {', '.join(unknown)}; there are {', '.join(known)}")
    if arguments.what == "compare":
        missing = [name for name in names if not (kept / f"{name}.yaml").is_file()]
        if missing:
            parser.error(f"{kept} has no recipe of {', '.join(missing)}; --keep says where the recording's folder is")
    begun = time.monotonic()
    print(f"flapkit of {package()}", flush=True)
    if arguments.what == "record":
        code = record(file, kept, names, arguments.jobs, arguments.only is not None)
    else:
        code = compare(recorded, kept, names, arguments.jobs, {*arguments.allow}, arguments.tolerance)
    print(f"{time.monotonic() - begun:.0f} s in all")
    return code


if __name__ == "__main__":
    sys.exit(main())
