"""The kill matrix: a run is stopped at each stage by each signal, nothing is lost, and a resumed run ends the same."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from conftest import RECIPE as SMALL

import flapkit
from flapkit import cli
from flapkit.checkpoint.weights import Weights
from flapkit.execution.record_files import hash_tensors
from flapkit.pruning.collector import run_batch

PLUGIN = '''
"""Stops its own process before some call of a function; kill.json says which, and by what signal."""

import json
import os
from pathlib import Path

import flapkit.checkpoint.save
import flapkit.execution.lightning.callbacks
import flapkit.execution.executor
import flapkit.execution.layerwise
import flapkit.model.surgery
import flapkit.run.sweep.results
import flapkit.system.workdir
from flapkit import hookimpl

POINTS = {
    "calibration": (flapkit.execution.lightning.callbacks.Calibrate, "on_predict_batch_end", 4),
    "search": (flapkit.execution.executor, "find_plan", 1),
    "slice": (flapkit.model.surgery, "_keep", 5),
    "write": (flapkit.checkpoint.save, "_write_config", 1),
    "swap": (flapkit.system.workdir, "exchange", 1),
    # Where a system cannot exchange two folders: the old output is set aside by the call before.
    "two renames": (Path, "rename", 2),
    "lora": (flapkit.execution.lightning.callbacks.Recover, "on_train_batch_end", 4),
    "measure a layer": (flapkit.execution.layerwise, "write_record", 3),
    "write a layer": (flapkit.execution.layerwise, "write_tensors", 1),
    "sweep": (flapkit.run.sweep.results.Results, "add", 2),
}


def stop_before(owner, name, call, number):
    whole, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return whole(*args, **kwargs)

    setattr(owner, name, stopping)


if Path("kill.json").exists():
    asked = json.loads(Path("kill.json").read_text())
    if asked["at"] == "two renames":
        flapkit.system.workdir.exchange = lambda one, other: False
    stop_before(*POINTS[asked["at"]], asked["signal"])


@hookimpl
def flapkit_metrics():
    return []
'''
RECIPE = {
    **SMALL,
    "model": {"path": "builtin:tiny-llama", "dtype": "float32"},
    "calibration": {"dataset": "text.txt", "samples": 12, "length": 16, "batch_size": 2},
    "budget": {"ratio": 0.3},
    "evaluate": {"perplexity": [{"dataset": "other.txt", "length": 16, "windows": 2}]},
    "plugins": ["./kill.py"],
}
LORA = {"name": "lora", "rank": 2, "steps": 6, "validate_every": 2, "validation_windows": 2, "length": 16, "lr": 1e-3}
SWEEP = {"recipe": "recipe.yaml", "grid": {"budget.ratio": [0.2, 0.3, 0.4]}, "output": "out"}
STAGES = ("calibration", "search", "slice", "write", "swap", "two renames", "lora", "measure a layer", "write a layer")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
QUICK = {("calibration", signal.SIGKILL)}


def prepare(home: Path) -> None:
    (home / "kill.py").write_text(PLUGIN)
    for name, word in (("text.txt", "model"), ("other.txt", "layer")):
        (home / name).write_text("".join(f"def f{n}({word}):\n    return {word} * {n}\n" for n in range(200)))
    (home / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (home / "lora.yaml").write_text(yaml.safe_dump({**RECIPE, "compensator": ["bias", LORA]}))
    (home / "layerwise.yaml").write_text(yaml.safe_dump({**RECIPE, "execution": "layerwise"}))
    (home / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))


def flapkit_(*arguments: str) -> int:
    """Run a command in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["flapkit", *arguments])
        try:
            cli.main()
        except SystemExit as stopped:
            return stopped.code or 0
    return 0


def command_of(stage: str) -> list[str]:
    if stage == "sweep":
        return ["sweep", "sweep.yaml", "-q", "--no-cache"]
    recipes = {"lora": "lora.yaml", "measure a layer": "layerwise.yaml", "write a layer": "layerwise.yaml"}
    return ["run", recipes.get(stage, "recipe.yaml"), "-q", "--no-cache"]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """What runs that nothing stops write, each when it is first asked for."""
    return tmp_path_factory.mktemp("done")


def unstopped(done: Path, stage: str) -> Path:
    command = command_of(stage)
    output = done / command[1]
    if not output.exists():
        assert flapkit_(*command, *(["--output"] if stage == "sweep" else ["--set"]), _named(stage, output)) == 0
    return output


def _named(stage: str, output: Path) -> str:
    return str(output) if stage == "sweep" else f"output={output}"


def hashes(folder: Path, *names: str) -> dict[str, str]:
    files = [folder / name for name in names] or [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows_without_time(folder: Path) -> list[dict[str, str]]:
    """Read the table of a sweep, without the minutes that its points took."""
    with (folder / "table.csv").open() as file:
        return [{name: cell for name, cell in row.items() if name != "minutes"} for row in csv.DictReader(file)]


def hash_weights(folder: Path) -> str:
    """Hash the tensors alone: safetensors writes what a file says of itself in any order."""
    return hash_tensors(sorted(Weights.of(folder.glob("*.safetensors")).items()))


def stop(home: Path, stage: str, number: signal.Signals, *options: str, command: Sequence[str] = ()) -> str:
    """Let a process run a command and stop itself; return what it said."""
    (home / "kill.json").write_text(json.dumps({"at": stage, "signal": number}))
    stopped = subprocess.run(
        [sys.executable, "-m", "flapkit", *(command or command_of(stage)), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        # Where the tests run in the background, a shell has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    (home / "kill.json").unlink()
    assert stopped.returncode == CODES[number], stopped.stderr
    assert "Traceback" not in stopped.stderr
    return stopped.stderr


def marked(stage: str, number: signal.Signals):
    marks = () if (stage, number) in QUICK else pytest.mark.slow
    return pytest.param(stage, number, marks=marks, id=f"{stage}-{number.name}")


@pytest.mark.parametrize(("stage", "number"), [marked(stage, number) for stage in STAGES for number in CODES])
def test_a_run_that_is_stopped(tmp_path, monkeypatch, done, stage, number):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    expected = unstopped(done, stage)
    # An older output, which is to be replaced.
    shutil.copytree(expected, "out")
    Path("out/older").write_text("than the run")
    older = hashes(Path("out"))

    said = stop(tmp_path, stage, number, "--overwrite")
    aside = Path(".out.work/replaced/out")
    assert aside.exists() == ((stage, number) == ("two renames", signal.SIGKILL))
    assert hashes(aside if aside.exists() else Path("out")) == older
    if number != signal.SIGKILL:
        assert said.endswith("error: interrupted; no output was written\n")
    assert flapkit_(*command_of(stage)) == 2

    assert flapkit_(*command_of(stage), "--resume", "--overwrite") == 0
    assert hashes(Path("out"), "plan.json", "config.json") == hashes(expected, "plan.json", "config.json")
    assert hash_weights(Path("out")) == hash_weights(expected)
    assert not Path("out/older").exists()
    assert not list(tmp_path.glob(".*"))
    assert flapkit.load("out").num_parameters() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rows"), [("sweep", 1), ("calibration", 0)])
@pytest.mark.parametrize("number", CODES)
def test_a_sweep_that_is_stopped(tmp_path, monkeypatch, done, number, stage, rows):
    """Rows that are there stay; without a cache, those that are missing are calibrated for once more."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    expected = unstopped(done, "sweep")
    stop(tmp_path, stage, number, command=command_of("sweep"))
    first = Path("out/results.jsonl").read_text() if rows else ""
    assert len(first.splitlines()) == rows
    batches, run_whole = [], run_batch
    monkeypatch.setattr(
        flapkit.execution.lightning.module, "run_batch", lambda *a, **k: (batches.append(a), run_whole(*a, **k))
    )
    assert flapkit_(*command_of("sweep")) == 0
    assert len(batches) == RECIPE["calibration"]["samples"] // RECIPE["calibration"]["batch_size"]
    assert Path("out/results.jsonl").read_text().startswith(first)
    assert rows_without_time(Path("out")) == rows_without_time(expected)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_two_processes_that_are_stopped(tmp_path, monkeypatch, done):
    """What they have finished is found by both."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    shared = ["--set", "trainer.devices=2", "--set", "trainer.strategy=ddp"]
    stop(tmp_path, "calibration", signal.SIGKILL, *shared, "--set", "calibration.samples=20")
    assert Path(".out.work/perplexity.json").is_file()
    command = [sys.executable, "-m", "flapkit", "run", "recipe.yaml", "--no-cache", "--set", "calibration.samples=20"]
    resumed = subprocess.run([*command, *shared, "--resume"], capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    subprocess.run([*command, "--set", "output=whole"], check=True)
    assert hashes(Path("out"), "plan.json") == hashes(Path("whole"), "plan.json")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("second", ["run", "recover", "sweep", "export"])
def test_two_that_write_one_output(tmp_path, monkeypatch, done, second):
    """The first is held in its calibration; the second is refused at once, and the first ends well."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    pruned = str(unstopped(done, "calibration"))
    (tmp_path / "link").symlink_to(tmp_path)
    commands = {
        "run": ["run", "recipe.yaml", "--set", "output=link/out", "--overwrite"],
        "recover": ["recover", pruned, "lora.yaml", "--set", "output=./link/./out"],
        "sweep": ["sweep", "sweep.yaml", "--output", "link/out"],
        "export": ["export", pruned, "--to", "hf", "--output", "link/out"],
    }
    (tmp_path / "kill.json").write_text(json.dumps({"at": "calibration", "signal": signal.SIGSTOP}))
    first = subprocess.Popen([sys.executable, "-m", "flapkit", *command_of("calibration")])
    while os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code != os.CLD_STOPPED:
        assert first.poll() is None
    (tmp_path / "kill.json").unlink()
    try:
        command = [sys.executable, "-m", "flapkit", *commands[second]]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    assert (refused.returncode, f"process {first.pid} on" in refused.stderr) == (2, True), refused.stderr
    assert hashes(Path("out"), "plan.json") == hashes(Path(pruned), "plan.json")
    assert not list(tmp_path.glob(".*"))
