"""Two processes on the CPU do as one does, and neither is left waiting for one that is gone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import RECIPE, write_recipe
from executions import add_tokenizer
from safetensors.torch import load_file

from flapkit.checkpoint.weights import Weights
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.system.errors import RecipeError
from flapkit.system.processes import broadcast_from_rank0, check_started, is_rank_zero, keep_common, rank

TWO = {
    **RECIPE,
    "calibration": {"dataset": "text.txt", "samples": 13, "length": 32, "batch_size": 2},
    "budget": {"ratio": 0.2},
    "metric": "faulty",
    "plugins": ["./faulty.py"],
    "evaluate": {"perplexity": [{"dataset": "test.txt", "length": 32, "windows": 9}]},
    "trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp"},
}
LORA = {"name": "lora", "rank": 4, "steps": 6, "validate_every": 2, "length": 32, "lr": 1e-3}
LORA |= {"batch_size": 4, "validation_windows": 8}
RECOVERY = {**TWO, "compensator": ["bias", LORA]}
LOST = "error: another process exited"
OUT_OF_MEMORY = "error: process 1: metric 'faulty' at layers.0.attention: MemoryError: it is out of memory"
FAULTY = """
import hashlib, os, signal, time
from dataclasses import dataclass
from pathlib import Path

from flapkit import hookimpl
from flapkit.execution.lightning.callbacks import LearnGates, Recover
from flapkit.interfaces import RunError
from flapkit.pruning.components import ImportanceMetric
from flapkit.execution.lightning.module import CausalLM
from flapkit.execution.shards import gathered
from flapkit.system.processes import rank

def fault(where):
    return f"{where} {rank()}" in os.environ["FAULT"]

@dataclass(frozen=True)
class Faulty(ImportanceMetric):
    name = "faulty"

    def score(self, site, stats, weight):
        if fault("memory"):
            raise MemoryError("it is out of memory")
        if fault("error"):
            raise RunError("it does not work")
        if fault("stuck"):
            time.sleep(600)
        if fault("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        return weight.abs().sum(dim=0).view(site.units, -1).sum(dim=1, keepdim=True)

@hookimpl
def flapkit_metrics():
    return [Faulty]

class Watched(Recover):
    def on_train_batch_end(self, trainer, *args, **kwargs):
        super().on_train_batch_end(trainer, *args, **kwargs)
        if fault("kill in training") and trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_fit_end(self, trainer, module):
        super().on_fit_end(trainer, module)
        weights = b"".join(gathered(weight).numpy().tobytes() for weight in module.state_dict().values())
        Path(f"weights of {rank()}").write_text(hashlib.sha256(weights).hexdigest())

class WatchedGates(LearnGates):
    def on_train_batch_end(self, trainer, *args, **kwargs):
        super().on_train_batch_end(trainer, *args, **kwargs)
        if fault("kill in training") and trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

class Step(CausalLM):
    def training_step(self, batch):
        return super().training_step(batch) * (float("nan") if fault("nan") else 1.0)

import flapkit.execution.training as stage
stage.Recover, stage.LearnGates, stage.CausalLM = Watched, WatchedGates, Step

import flapkit.execution.layerwise as layers
step_all = layers.step_all

def step_to_death(stream, index, *args, **kwargs):
    step_all(stream, index, *args, **kwargs)
    if kwargs.get("store") and fault(f"kill at layer {index}"):
        os.kill(os.getpid(), signal.SIGKILL)

layers.step_all = step_to_death

import flapkit.execution.lightning.callbacks as callbacks
check = callbacks.Collector.check

def check_to_death(collector):
    check(collector)
    if fault("error in calibration"):
        raise RunError("it does not work")
    if fault("kill in calibration"):
        os.kill(os.getpid(), signal.SIGKILL)

callbacks.Collector.check = check_to_death
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("text", "test"):
        lines = [f"def {name}_{number}(model):\n    return model * {number}\n" for number in range(400)]
        (folder / f"{name}.txt").write_text("".join(lines))
    (folder / "faulty.py").write_text(FAULTY)
    return folder


def flapkit(
    home: Path, recipe: dict, output: str, *options: str, launcher=("-m",), fault="", environment=None
) -> subprocess.Popen[str]:
    """Start a run; each has a cache of its own, so that it calibrates."""
    write_recipe(home, f"{output}.yaml", **{**recipe, "output": output})
    variables = {"FLAPKIT_CACHE": str(home / f"cache of {output}"), "FAULT": fault, **(environment or {})}
    return start(home, [*launcher, "flapkit", "run", f"{output}.yaml", *options], variables)


def start(home: Path, command: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=home,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return a run's exit code and what it printed; no run takes so long that it is ended."""
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, out, err


def alone(recipe: dict) -> dict:
    """Return a recipe for one process."""
    return {**recipe, "trainer": {**recipe["trainer"], "devices": 1, "strategy": "auto"}}


def same_weights(one: Path, other: Path, atol: float = 0.0) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return all(torch.allclose(first[name], second[name], rtol=0, atol=atol) for name in first)


@pytest.fixture(scope="module")
def recovered(home) -> Path:
    """The output of two processes that pruned a model and trained it."""
    code, out, err = end(flapkit(home, RECOVERY, "recovered"))
    assert code == 0, err
    assert out.count("block parameters") == 1
    assert err.count("recover: validation perplexity") == 1
    return home / "recovered"


def test_a_process_alone_is_the_first(monkeypatch):
    assert (rank(), is_rank_zero()) == (0, True)
    assert broadcast_from_rank0(lambda: "done") == "done"
    assert keep_common({"a": 1, "b": None, "c": 0}) == {"a": 1, "c": 0}


@pytest.mark.parametrize("name", ["RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"])
def test_before_they_have_met_the_environment_says_which_process_it_is(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert not is_rank_zero()


@pytest.mark.parametrize(
    "environment",
    [
        {"TORCHELASTIC_RUN_ID": "some", "WORLD_SIZE": "2"},
        {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_as_many_processes_as_the_recipe_asks_for(monkeypatch, environment):
    check_started(1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_started(2)
    with pytest.raises(RecipeError, match="the number of started processes is 2, but devices x num_nodes is 1"):
        check_started(1)


@pytest.mark.slow
def test_two_processes_are_one(home):
    one, two = (flapkit(home, recipe, name) for name, recipe in (("one", alone(TWO)), ("two", TWO)))
    for code, out, err in [end(process) for process in (one, two)]:
        assert code == 0, err
        assert out.count("block parameters") == 1
    assert (home / "one" / "plan.json").read_bytes() == (home / "two" / "plan.json").read_bytes()
    one, two = (json.loads((home / name / "result.json").read_text())["perplexity"] for name in ("one", "two"))
    (one,), (two,) = one.values(), two.values()
    assert two["dense"] == pytest.approx(one["dense"], rel=1e-6)
    assert two["pruned"] == pytest.approx(one["pruned"], rel=1e-6)


LAYERWISE = {
    **alone(TWO),
    "metric": "wifv",
    "compensator": {"name": "least_squares", "ridge": 0.01},
    "calibration": {**TWO["calibration"], "statistics_memory": "8MB"},
    "execution": {"mode": "layerwise", "hidden_states": "disk"},
}


@pytest.fixture(scope="module")
def layerwise(home) -> Path:
    """The output of one process that had one layer at a time in memory, and measured in parts, twice."""
    code, _, err = end(flapkit(home, LAYERWISE, "layerwise"))
    assert code == 0, err
    return home / "layerwise"


def shared(recipe: dict) -> dict:
    """Return a recipe for two processes."""
    return {**recipe, "trainer": TWO["trainer"]}


def is_as(layerwise: Path, folder: Path) -> bool:
    """Tell whether a run's output is that of one process: its plan, its weights, its perplexities."""
    assert (folder / "plan.json").read_bytes() == (layerwise / "plan.json").read_bytes()
    expected, found = (Weights.of(run.glob("*.safetensors")) for run in (layerwise, folder))
    assert set(found) == set(expected)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5, rtol=1e-5) for name in expected)
    one, two = (json.loads((run / "result.json").read_text())["perplexity"] for run in (layerwise, folder))
    (one,), (two,) = one.values(), two.values()
    return all(two[which] == pytest.approx(one[which], rel=1e-5) for which in ("dense", "pruned"))


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["memory", "disk"])
def test_two_processes_share_the_windows_layer_by_layer(home, layerwise, hidden):
    recipe = {**shared(LAYERWISE), "execution": {"mode": "layerwise", "hidden_states": hidden}}
    code, out, err = end(flapkit(home, recipe, f"layerwise in {hidden}"))
    assert code == 0, err
    assert out.count("block parameters") == 1
    assert is_as(layerwise, home / f"layerwise in {hidden}")


@pytest.mark.slow
def test_a_process_killed_between_two_layers_ends_the_run_which_can_go_on(home, layerwise):
    recipe = {**shared(LAYERWISE), "plugins": TWO["plugins"]}
    code, _, err = end(flapkit(home, recipe, "layers killed", fault="kill at layer 2 1"))
    assert code not in (0, -15)
    assert not (home / "layers killed").exists()
    finished = sorted(path.name for path in (home / ".layers killed.work" / "calibration").iterdir())
    assert finished == ["00000.safetensors", "00001.safetensors"]
    code, _, err = end(flapkit(home, recipe, "layers killed", "--resume"))
    assert code == 0, err
    assert is_as(layerwise, home / "layers killed")
    assert not list(home.glob(".layers killed*"))


@pytest.mark.slow
def test_torchrun_layer_by_layer(home, layerwise):
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m")
    code, out, err = end(flapkit(home, shared(LAYERWISE), "layers of torchrun", launcher=launcher))
    assert code == 0, err
    assert out.count("block parameters") == 1
    assert is_as(layerwise, home / "layers of torchrun")


@pytest.mark.slow
def test_two_processes_try_the_same_plans_layer_by_layer(home):
    searcher = {"name": "evolution", "generations": 2, "children": 3, "survivors": 1, "steps": [0.25]}
    recipe = {**LAYERWISE, "searcher": searcher, "calibration": {**LAYERWISE["calibration"], "samples": 24}}
    for name, own in (("tried alone", {}), ("tried by two", {"trainer": TWO["trainer"]})):
        code, out, err = end(flapkit(home, {**recipe, **own}, name))
        assert code == 0, err
        assert out.count("block parameters") == 1
    assert is_as(home / "tried alone", home / "tried by two")
    assert not list(home.glob(".tried by two*"))


GATES = {
    **TWO,
    "metric": "wifv",
    "searcher": {"name": "gates", "steps": 6, "batch_size": 2, "validate_every": 2, "validation_windows": 4},
    "compensator": {"name": "least_squares", "ridge": 0.01},
    "calibration": {**TWO["calibration"], "samples": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_gates_of_two_processes_are_those_of_one_with_twice_the_batch(home, stopped):
    name = f"gates {'stopped' if stopped else 'of two'}"
    if stopped:
        code, _, err = end(flapkit(home, GATES, name, fault="kill in training 1"))
        assert code not in (0, -15), err
        assert not (home / name).exists()
    code, out, err = end(flapkit(home, GATES, name, *(["--resume"] if stopped else [])))
    assert code == 0, err
    assert out.count("block parameters") == 1
    if not (home / "gates alone").exists():
        code, _, err = end(flapkit(home, alone(GATES), "gates alone", "--set", "searcher.batch_size=4"))
        assert code == 0, err
    two, one = (json.loads((home / run / "result.json").read_text())["search"] for run in (name, "gates alone"))
    assert two["training_loss"] == pytest.approx(one["training_loss"], rel=1e-4)
    assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)
    assert is_as(home / "gates alone", home / name)
    assert not list(home.glob(f".{name}*"))


HALVES = {"trainer": {"accelerator": "cpu", "devices": 2, "strategy": "model_parallel"}, "execution": "layerwise"}
METHODS = {
    "wifv": {"metric": "wifv"},
    "least_squares": {key: LAYERWISE[key] for key in ("metric", "compensator", "calibration")},
    "experts": {
        "metric": "wifv",
        "model": {"path": "mixtral"},
        "calibration": {**TWO["calibration"], "samples": 129},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_that_each_have_half_of_the_model(home, method):
    """13 windows to calibrate on and 9 to evaluate: one process has a window more than the other."""
    if method == "experts":
        tiny_model(tiny_config("mixtral", vocab_size=4096)).save_pretrained(home / "mixtral")
        add_tokenizer(home / "mixtral")
    recipe = {**TWO, **METHODS[method]}
    for name, own in (("whole", {"trainer": alone(TWO)["trainer"]}), ("halves", HALVES)):
        code, out, err = end(flapkit(home, {**recipe, **own}, f"{name} {method}"))
        assert code == 0, err
        assert out.count("block parameters") == 1
    assert is_as(home / f"whole {method}", home / f"halves {method}")


@pytest.mark.slow
def test_torchrun_of_halves_that_are_evaluated(home):
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m")
    recipe = {**TWO, "metric": "wifv", **HALVES}
    code, out, err = end(flapkit(home, recipe, "halves of torchrun", launcher=launcher))
    assert code == 0, err
    assert out.count("block parameters") == 1
    command = ["-m", "flapkit", "evaluate", "halves of torchrun", "--output", "halves.json"]
    code, out, err = end(start(home, command, {"FAULT": ""}))
    assert code == 0, err
    (found,) = json.loads((home / "halves.json").read_text())["perplexity"].values()
    (measured,) = json.loads((home / "halves of torchrun" / "result.json").read_text())["perplexity"].values()
    assert found["model"] == pytest.approx(measured["pruned"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("error 1", ["error: process 1: it does not work", LOST]),
        ("error in calibration 1", ["error: process 1: it does not work", LOST]),
        ("error in calibration 0", ["error: it does not work"]),
        ("kill in calibration 1", [LOST]),
    ],
)
def test_a_process_with_half_of_the_model_that_dies_ends_the_run(home, fault, said):
    recipe = {**TWO, **HALVES, "compensator": "bias"}
    code, _, err = end(flapkit(home, recipe, f"half {fault}", "-q", fault=fault))
    told = [line for line in err.splitlines() if line.startswith("error: ") or "Error: " in line]
    # Lightning kills the first process if it looks after the other before the two talk to each other.
    assert code == -9 or (code == 1 and all(any(line.startswith(each) for line in told) for each in said))
    assert all(any(line.startswith(each) for line in told) for each in said if each != LOST)
    assert not (home / f"half {fault}").exists()


@pytest.mark.slow
def test_a_recovery_of_two_processes_is_that_of_one_with_twice_the_batch(home, recovered):
    assert (home / "weights of 0").read_text() == (home / "weights of 1").read_text()
    code, _, err = end(flapkit(home, alone(RECOVERY), "trained alone", "--set", "compensator.1.batch_size=8"))
    assert code == 0, err
    two, one = (json.loads((home / name / "result.json").read_text()) for name in ("recovered", "trained alone"))
    assert two["recovery"]["validation_perplexity"] == pytest.approx(one["recovery"]["validation_perplexity"], rel=1e-4)
    (measured,) = two["perplexity"].values()
    assert measured["recovered"] < measured["pruned"]
    assert same_weights(home / "recovered", home / "trained alone", atol=1e-5)
    assert not list(home.glob(".recovered*"))


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_a_recovery_of_two_halves_is_that_of_two_wholes(home, recovered, stopped):
    recipe, name = {**RECOVERY, **HALVES}, f"halves recovered {stopped}"
    if stopped:
        code, _, err = end(flapkit(home, recipe, name, fault="kill in training 1"))
        assert code not in (0, -15), err
        assert not (home / name).exists()
    code, out, err = end(flapkit(home, recipe, name, *(["--resume"] if stopped else [])))
    assert code == 0, err
    assert out.count("block parameters") == 1
    halves, wholes = (json.loads((run / "result.json").read_text()) for run in (home / name, recovered))
    expected = wholes["recovery"]["validation_perplexity"]
    assert halves["recovery"]["validation_perplexity"] == pytest.approx(expected, rel=1e-4)
    found, weights = (Weights.of(run.glob("*.safetensors")) for run in (home / name, recovered))
    assert set(found) == set(weights)
    assert all(torch.allclose(found[name], weights[name], rtol=0, atol=1e-5) for name in weights)
    assert not list(home.glob(f".{name}*"))


@pytest.mark.slow
def test_halves_learn_from_a_teacher_in_halves_and_leave_an_adapter(home):
    changes = [f"compensator.1.{option}" for option in ("merge=false", "distill=true")]
    for name, own in (("taught wholes", {}), ("taught halves", HALVES)):
        sets = [part for change in changes for part in ("--set", change)]
        code, _, err = end(flapkit(home, {**RECOVERY, **own}, name, *sets))
        assert code == 0, err
    wholes, halves = (home / f"taught {name}" for name in ("wholes", "halves"))
    expected, found = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (wholes, halves))
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-5) for name in expected)
    configs = [json.loads((folder / "adapter" / "adapter_config.json").read_text()) for folder in (wholes, halves)]
    assert configs[1]["base_model_name_or_path"] == "taught halves"
    assert configs[0]["target_modules"].sort() == configs[1]["target_modules"].sort()
    assert is_as(wholes, halves)


@pytest.mark.slow
def test_two_processes_evaluate_as_the_run_did(home, recovered):
    command = ["-m", "flapkit", "evaluate", "recovered", "--output", "evaluated.json"]
    code, out, err = end(start(home, command, {"FAULT": ""}))
    assert code == 0, err
    assert out.count("perplexity, ") == 1
    (found,) = json.loads((home / "evaluated.json").read_text())["perplexity"].values()
    (measured,) = json.loads((recovered / "result.json").read_text())["perplexity"].values()
    assert found["model"] == pytest.approx(measured["recovered"], rel=1e-6)


@pytest.mark.slow
def test_a_process_killed_in_training_ends_the_run_which_can_go_on(home, recovered):
    code, _, err = end(flapkit(home, RECOVERY, "killed", fault="kill in training 1"))
    assert code not in (0, -15)
    assert not (home / "killed").exists()
    code, out, err = end(flapkit(home, RECOVERY, "killed", "--resume", "--json"))
    assert code == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    stages = {event.get("stage") for event in events}
    assert ("calibrate" in stages, "recover" in stages) == (False, True)
    assert [event["event"] for event in events].count("result") == 1
    assert same_weights(home / "killed", recovered)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_all_with_one_message(home):
    code, _, err = end(flapkit(home, RECOVERY, "nan", "-q", fault="nan 1"))
    assert code == 1
    assert err.count("error: ") == err.count("error: the recovery's loss is not finite at step 1") == 1
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("error 0, error 1", 1, ["error: it does not work"]),
        ("error 1", 1, ["error: process 1: it does not work", LOST]),
        ("memory 1", 1, [OUT_OF_MEMORY, LOST]),
        ("kill 1", 1, [LOST]),
        ("kill 0, stuck 1", -9, []),
    ],
)
def test_the_error_of_a_process_is_told_once(home, fault, code, said):
    # It ends when both processes have: both write to the same pipe.
    output = fault.replace(", ", " and ")
    found, _, err = end(flapkit(home, TWO, output, "-q", fault=fault))
    told = [line for line in err.splitlines() if line.startswith("error: ") or "Error: " in line]
    # Lightning kills the first process if it looks after the other before the two talk to each other.
    assert (found == code and len(told) == len(said)) or found == -9
    assert all(any(line.startswith(each) for line in told) for each in said if each != LOST)
    assert not (home / output).exists()


TORCHRUN = ("-m", "torch.distributed.run")


@pytest.mark.slow
def test_torchrun_on_one_machine(home, recovered):
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m")
    code, out, err = end(flapkit(home, RECOVERY, "torchrun", launcher=launcher))
    assert code == 0, err
    assert out.count("block parameters") == 1
    assert same_weights(home / "torchrun", recovered)


@pytest.mark.slow
def test_torchrun_on_two_machines(home, recovered):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    recipe = {**RECOVERY, "trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": 2, "strategy": "ddp"}}
    machines = []
    for machine in ("0", "1"):
        launcher = (*TORCHRUN, "--nnodes", "2", "--node-rank", machine, "--nproc-per-node", "1")
        launcher += ("--master-addr", "localhost", "--master-port", str(port), "-m")
        # What the first machine has in its cache and the other has not, both measure.
        cache = {"FLAPKIT_CACHE": str(home / f"cache of {('recovered', 'machines')[int(machine)]}")}
        machines.append(flapkit(home, recipe, "machines", launcher=launcher, environment=cache))
    for machine, (code, out, err) in enumerate([end(machine) for machine in machines]):
        assert code == 0, err
        assert out.count("block parameters") == err.count("\ncalibrate: ") == (machine == 0)
    assert same_weights(home / "machines", recovered)


@pytest.mark.slow
def test_srun(home, recovered):
    """As srun starts them: Lightning reads from SLURM's variables which process is which."""
    job = {"SLURM_JOB_ID": str(20000 + os.getpid() % 10000), "SLURM_NODELIST": "localhost", "SLURM_NNODES": "2"}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    recipe = {**RECOVERY, "trainer": {"accelerator": "cpu", "devices": 1, "num_nodes": 2, "strategy": "ddp"}}
    tasks = []
    for task in ("0", "1"):
        variables = {**job, "SLURM_PROCID": task, "SLURM_NODEID": task, "SLURM_LOCALID": "0"}
        variables["FLAPKIT_CACHE"] = str(home / "cache of recovered")
        tasks.append(flapkit(home, recipe, "srun", environment=variables))
    for task, (code, out, err) in enumerate([end(task) for task in tasks]):
        assert code == 0, err
        assert out.count("block parameters") == (task == 0)
        assert "\ncalibrate: " not in err
    assert same_weights(home / "srun", recovered)


@pytest.mark.slow
def test_torchrun_with_another_number_of_processes(home):
    launcher = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m")
    code, _, err = end(flapkit(home, alone(TWO), "mismatched", launcher=launcher))
    assert code != 0
    # The other process says it as well, under its own name, if the launcher is slow to end it.
    assert err.count("error: trainer: the number of started processes is 2, but devices x num_nodes is 1") == 1
    assert not (home / "mismatched").exists()
