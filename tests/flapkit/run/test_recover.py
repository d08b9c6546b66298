"""Recovery as a user meets it: a run that trains, one that is stopped and goes on, and one from a checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
import yaml
from conftest import write_recipe

import flapkit
from flapkit.execution.lightning.callbacks import Recover
from flapkit.recipe.load import load_recipe
from flapkit.run import pipeline
from flapkit.run.pipeline import run
from flapkit.run.recover import RecoveryRecord, recover

LORA = {"name": "lora", "rank": 4, "steps": 6, "validate_every": 2, "validation_windows": 4, "length": 32, "lr": 1e-3}
CHANGES = {
    "calibration": {"dataset": "train.txt", "samples": 8, "length": 32},
    "compensator": ["bias", LORA],
    "evaluate": {"perplexity": [{"dataset": "test.txt", "length": 32, "windows": 4}]},
}


def write_texts(folder: Path) -> None:
    lines = [f"    assert pruned(model, {number}) is not None, 'sites of layer {number}'\n" for number in range(400)]
    (folder / "train.txt").write_text("".join(lines[::2]))
    (folder / "test.txt").write_text("".join(lines[1::2]))


@pytest.fixture
def home(home) -> Path:
    write_texts(home)
    return home


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A folder in which the recipe was run whole, and its pruning alone."""
    folder = tmp_path_factory.mktemp("done")
    write_texts(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        run(load_recipe(write(folder), ["output=whole"]))
        run(load_recipe(write(folder), ["output=pruned", "compensator=bias"]))
    return folder


def write(home: Path, **changes) -> Path:
    return write_recipe(home, **{**CHANGES, **changes})


def weights(path: Path) -> dict[str, torch.Tensor]:
    return flapkit.load(path).state_dict()


def equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_warning_of_the_pruning_and_of_the_whole_run_stands_once(tmp_path):
    warnings = [f"{tmp_path}/text.txt: short", "other", f"{tmp_path}/text.txt: short", "other"]
    record = RecoveryRecord(tmp_path, {}, [], {}, {}, {}, {}, ["text.txt: short", *warnings])
    assert record.result()["warnings"] == ["text.txt: short", "other"]


def test_what_a_run_that_trains_leaves(done):
    result = json.loads((done / "whole" / "result.json").read_text())
    (measured,) = result["perplexity"].values()
    assert measured["recovered"] < measured["pruned"]
    assert list(result["recovery"]["validation_perplexity"]) == ["0", "2", "4", "6"]
    files = {path.name for path in (done / "whole").iterdir()}
    assert {"structure.png", "recipe.yaml", "plan.json", "logs", "model.safetensors"} <= files
    assert (done / "whole" / "logs" / "version_0" / "metrics.csv").is_file()
    assert yaml.safe_load((done / "whole" / "recipe.yaml").read_text())["compensator"][1]["rank"] == 4
    assert json.loads((done / "whole" / "flapkit.json").read_text())["recovery"]["best_step"] == 6
    assert not list(done.glob(".*"))


def test_a_merged_checkpoint_needs_no_peft(done):
    code = "import sys; sys.modules['peft'] = None; import flapkit; print(flapkit.load('whole').num_parameters())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=done)
    assert int(found.stdout) == flapkit.load(done / "whole").num_parameters()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_an_adapter_beside_the_pruned_model(command, home, done, probe):
    code, out, err = command("run", write(home), "--set", "compensator.1.merge=false")
    assert code == 0, err
    assert "recovered" in out
    assert equal(home / "out", done / "pruned")
    config = json.loads((home / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "out"
    adapted = peft.PeftModel.from_pretrained(flapkit.load(home / "out"), home / "out" / "adapter")
    expected = flapkit.load(done / "whole")(probe).logits
    torch.testing.assert_close(adapted(probe).logits, expected, atol=1e-4, rtol=1e-5)


def test_from_a_checkpoint(command, home, done):
    lora = f"compensator=[bias, {json.dumps(LORA)}]"
    code, out, err = command("recover", done / "pruned", "--set", lora, "--set", "output=recovered")
    assert code == 0, err
    assert "dense" in out
    assert equal(home / "recovered", done / "whole")
    assert (home / "recovered" / "plan.json").read_bytes() == (done / "pruned" / "plan.json").read_bytes()


def test_figures_of_other_text_are_measured_anew(home, done):
    record = recover(done / "pruned", load_recipe(write(home), ["evaluate.perplexity.0.windows=2"]))
    (measured,) = record.perplexity.values()
    assert set(measured["bits_per_byte"]) == {"pruned", "recovered"}
    assert "dense" not in measured


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("compensator.1.dataset=test.txt", "the recovery would train on test.txt, and `evaluate` measures"),
        (
            "calibration={mix: [{dataset: stdlib}, {dataset: test.txt}], samples: 8}",
            "the recovery would train on test.txt, and `evaluate` measures",
        ),
        ("compensator.1.validation={dataset: test.txt}", "the recovery would validate on test.txt, and `evaluate`"),
        ("compensator.1.length=5000", "but 5,001 are needed for windows of 5000"),
        ("compensator.1.targets=[q_prj]", "lora: targets: there is no linear 'q_prj'; did you mean 'q_proj'?"),
        ("compensator.1.steps=0", "compensator.1.steps: expected at least 1, got 0"),
        ("compensator.1.dataset=nowhere.txt", "nowhere.txt: file or folder not found"),
        ("compensator=[lora, lora]", "compensators 'lora' and 'lora' train the same model; keep one of them"),
    ],
)
def test_bad_input_is_known_before_anything_is_run(command, home, override, expected):
    code, _, err = command("run", write(home), "--set", override)
    assert code == 2
    assert expected in err
    assert [path.name for path in home.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("compensator=bias", "none of its compensators trains; add one, for example --set 'compensator=[bias, lora]'"),
        ("compensator.1.targets=[q_prj]", "lora: targets: there is no linear 'q_prj'; did you mean 'q_proj'?"),
    ],
)
def test_bad_input_with_a_checkpoint(command, home, done, override, expected):
    code, _, err = command("recover", done / "pruned", write(home), "--set", override)
    assert code == 2
    assert expected in err


def test_the_checkpoint_is_no_output(command, home, done):
    code, _, err = command("recover", done / "pruned", write(home), "--set", f"output={done / 'pruned'}", "--overwrite")
    assert code == 2
    assert "is the checkpoint itself" in err


def test_check_tells_what_is_trained(command, home):
    code, out, err = command("check", write(home))
    assert code == 0, err
    assert "parameters are trained after pruning" in out
    code, _, err = command("check", write(home), "--set", "compensator.1.dataset=test.txt")
    assert (code, "`evaluate` measures" in err) == (2, True)


def test_what_is_no_checkpoint(command, home):
    code, _, err = command("recover", home, write(home))
    assert code == 2
    assert "is not a pruned checkpoint of flapkit" in err


def stop_at(monkeypatch, step, error):
    batch_end = Recover.on_train_batch_end

    def stopping(self, trainer, *args, **kwargs):
        if trainer.global_step == step:
            raise error
        batch_end(self, trainer, *args, **kwargs)

    monkeypatch.setattr(Recover, "on_train_batch_end", stopping)


def test_a_stopped_run_goes_on_and_ends_the_same(home, done, monkeypatch):
    recipe = load_recipe(write(home))
    with monkeypatch.context() as patched:
        stop_at(patched, 5, SystemError("killed"))
        with pytest.raises(SystemError):
            run(recipe)
    assert (home / ".out.work" / "recovery" / "last.ckpt").is_file()
    assert not (home / "out").exists()
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_prune", None)
        record = run(recipe, resume=True)
    assert equal(home / "out", done / "whole")
    assert set(record.seconds) >= {"calibrate", "recover"}
    assert not list(home.glob(".out*"))


def test_a_loss_that_is_not_finite_leaves_the_pruned_model(command, home):
    recipe = write(home)
    sets = ["--set", "compensator.1.lr=1e30", "--set", "trainer.gradient_clip_val=null"]
    code, _, err = command("run", recipe, "-q", *sets)
    assert code == 1
    assert "loss is not finite at step" in err
    assert "the pruned model in" in err
    assert not (home / "out").exists()
    assert flapkit.load(home / ".out.work" / "pruned").num_parameters() > 0
    code, _, err = command("run", recipe)
    assert (code, "--resume" in err and "--overwrite" in err) == (2, True)
    code, _, err = command("run", recipe, "--resume")
    assert code == 0
    assert "evaluate dense" not in err
    result = json.loads((home / "out" / "result.json").read_text())
    assert min(result["recovery"]["validation_perplexity"].values()) < 1e6


def test_ctrl_c_says_what_goes_on(command, home, monkeypatch, caplog):
    recipe = write(home)
    with monkeypatch.context() as patched:
        stop_at(patched, 3, KeyboardInterrupt())
        assert command("run", recipe)[0] == 130
    assert f"finished work is in {home / '.out.work'}; --resume continues from it" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("when", ["pruned", "last.ckpt"])
def test_sigkill(home, when):
    """Killed after the model was pruned, or in the middle of the training: with --resume it ends the same."""
    recipe = write(home, compensator=["bias", {**LORA, "steps": 60, "validate_every": 6}])
    command = [sys.executable, "-m", "flapkit", "run", str(recipe), "-q"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--set", "output=whole"], check=True, env=environment)
    process = subprocess.Popen(command, env=environment)
    while not list((home / ".out.work").glob(f"**/{when}")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (home / "out").exists()
    subprocess.run([*command, "--resume"], check=True, env=environment)
    assert equal(home / "out", home / "whole")
    assert not list(home.glob(".out*"))
