"""Nothing outside the output folder is ever written, whatever a recipe, a checkpoint or the folder itself names."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import TEXT as CALIBRATION_TEXT
from conftest import make_llama, write_recipe
from fuzzing import TEXT, cases, cut_
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedModel

import flapkit
from flapkit.checkpoint.bundled import bundled_models
from flapkit.checkpoint.folder import check_output
from flapkit.model.plan import PruningPlan
from flapkit.system.errors import FlapkitError, InputError, ModelError, OutputError
from flapkit.system.paths import to_path, within

PARTS = st.sampled_from(["..", ".", "", "a", "b.txt", "/", "\\", "C:", "~", "\0", " ", "..\\x", "...", "a/../.."])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map("/".join) | TEXT


@cases(600)
@given(NAMES)
@example("../x")
@example("/x")
@example("a/../../x")
@example("..\\..\\x")
@example("C:/x")
@example("\\\\server\\share\\x")
@example("")
@example(".")
def test_a_name_stays_within_its_folder(name):
    folder = Path("/some/where/folder")
    try:
        path = within(folder, name)
    except InputError:
        return
    assert path.is_relative_to(folder)
    assert path != folder
    assert ".." not in path.parts
    assert ".." not in name.replace("\\", "/").split("/")


@cases(400)
@given(NAMES)
@example("a" * 300)
@example("a/" * 3000)
@example("~nobody-of-this-name")
@example("\0")
def test_a_path_can_be_reached_or_is_refused(name):
    try:
        path = to_path(name)
    except InputError as error:
        assert "\0" not in str(error)  # noqa: PT017 - both ways are right
        return
    path.exists()


def listing(folder: Path) -> dict[str, str]:
    """List everything in a folder: files with a hash of what they hold, links with what they lead to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"link to {path.readlink()}"
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


@pytest.fixture
def sandbox(tmp_path, monkeypatch) -> Path:
    """A folder beside others that nobody may touch: ``outside`` and what lies around ``home``, where commands run."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("a secret")
    (tmp_path / "outside" / ".profile").write_text("settings")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "outside"))
    (tmp_path / "home" / "text.txt").write_text(CALIBRATION_TEXT)
    return tmp_path


CHANGES = {
    "calibration": {"dataset": "text.txt", "samples": 4, "length": 32},
    "evaluate": {},
    "report": {"figures": ["svg"]},
    "export": ["hf"],
}


@pytest.fixture
def call(sandbox, command, monkeypatch):
    """Run a command in the sandbox; nothing but ``home`` may have changed, and of that only what is named."""
    home = sandbox / "home"
    monkeypatch.chdir(home)

    def run(*arguments, may_write: tuple[str, ...] = (), **changes):
        write_recipe(home, **{**CHANGES, **changes})
        before = listing(sandbox)
        said = command(*arguments)
        after = listing(sandbox)
        allowed = tuple(str(home / name) for name in may_write)
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        assert not [path for path in changed if not path.startswith(allowed or ("nothing",))], said
        return said

    return run


@pytest.fixture
def home(sandbox) -> Path:
    return sandbox / "home"


def test_a_whole_run_writes_its_output_alone(call, home):
    code, _, err = call("run", "recipe.yaml", "-q", may_write=("out",))
    assert code == 0, err
    assert call("report", "out", "--figures", "out/more", may_write=("out/report.html", "out/more"))[0] == 0
    assert call("show", "out")[0] == 0
    assert call("export", "out", "--to", "hf-stock", "-o", "form", may_write=("form",))[0] in (0, 2)


def test_links_in_an_output_that_is_replaced_are_not_followed(call, home, sandbox):
    plain = {"report": {}, "export": []}
    assert call("run", "recipe.yaml", "-q", may_write=("out",), **plain)[0] == 0
    (home / "out" / "folder").symlink_to(sandbox / "outside")
    (home / "out" / "plan.json").unlink()
    (home / "out" / "plan.json").symlink_to(sandbox / "outside" / "secret")
    assert call("run", "recipe.yaml", "-q", "--overwrite", may_write=("out",), **plain)[0] == 0
    assert not (home / "out" / "folder").exists()
    assert not (home / "out" / "plan.json").is_symlink()
    (home / "out" / "report.html").unlink()
    (home / "out" / "report.html").symlink_to(sandbox / "outside" / "secret")
    code, _, err = call("report", "out")
    assert (code, "report.html is a link" in err) == (2, True), err


def test_an_output_that_is_a_link(call, home, sandbox):
    (home / "out").symlink_to(sandbox / "outside")
    code, _, err = call("run", "recipe.yaml", "-q", "--overwrite")
    assert (code, "out is a link" in err) == (2, True), err


def test_a_work_folder_that_is_a_link(call, home, sandbox):
    """It is tidied, dotfiles and all: a link to somebody's home would cost them their settings."""
    (home / ".out.work").symlink_to(sandbox / "outside")
    for more in ((), ("--overwrite",), ("--resume",)):
        code, _, err = call("run", "recipe.yaml", "-q", *more)
        assert (code, ".out.work is a link" in err) == (2, True), err


def test_results_of_a_sweep_that_are_a_link(call, home, sandbox):
    (home / "sweep.yaml").write_text(
        yaml.safe_dump({"recipe": "recipe.yaml", "grid": {"metric": ["ifv"]}, "output": "s"})
    )
    (home / "s").mkdir()
    (sandbox / "outside" / "empty").touch()
    (home / "s" / "results.jsonl").symlink_to(sandbox / "outside" / "empty")
    code, _, err = call("sweep", "sweep.yaml", export=[])
    assert (code, "results.jsonl is a link" in err) == (2, True), err
    (home / "s" / "results.jsonl").unlink()
    (home / "s" / "results.jsonl").touch()
    (home / "s" / ".table.csv.partial").symlink_to(sandbox / "outside" / "empty")
    code, _, err = call("sweep", "sweep.yaml", export=[], may_write=("s",))
    assert code == 0, err


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b", "..", ""])
def test_chat_templates_that_are_called_like_paths(call, home, name):
    """transformers writes each as a file of that name."""
    shutil.copytree(bundled_models()["tiny-llama"], home / "model")
    path = home / "model" / "tokenizer_config.json"
    templates = [{"name": "default", "template": "x"}, {"name": name, "template": "y"}]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": templates}))
    code, _, err = call("run", "recipe.yaml", "-q", model={"path": "model"})
    assert (code, "is not a valid name of a chat template" in err) == (2, True), err


@pytest.fixture(scope="module")
def unpruned() -> tuple[PreTrainedModel, PruningPlan]:
    model = make_llama()
    return model, cut_(model)


def test_files_that_are_saved_along(unpruned, tmp_path):
    model, plan = unpruned

    @cases(25)
    @given(st.lists(NAMES, min_size=1, max_size=3))
    @example(["../evil"])
    @example(["/tmp/evil"])
    @example(["a/b/c.txt"])
    def check(names):
        before = listing(tmp_path)
        try:
            flapkit.save(model, tmp_path / "out", plan, files=dict.fromkeys(names, "content"), overwrite=True)
        except InputError:
            assert {path for path in listing(tmp_path) if "/out" not in path} == {
                path for path in before if "/out" not in path
            }
            return
        assert all(path.startswith(str(tmp_path / "out")) for path in listing(tmp_path))

    check()


def test_a_checkpoint_that_carries_another_s_file(call, home, sandbox):
    """``flapkit recover`` takes along what ``flapkit.json`` names."""
    lora = {"name": "lora", "rank": 2, "steps": 1, "validation_windows": 2, "length": 16, "batch_size": 1}
    assert call("run", "recipe.yaml", "-q", export=[], may_write=("out",))[0] == 0
    mark = home / "out" / "flapkit.json"
    for name in ("../../outside/secret", str(sandbox / "outside" / "secret")):
        mark.write_text(json.dumps({**json.loads(mark.read_text()), "files": [name]}))
        code, _, err = call(
            "recover", "out", "recipe.yaml", "-q", export=[], output="again", compensator=["bias", lora], may_write=()
        )
        assert (code, "is not a file name inside" in err) == (2, True), err


def test_what_is_pushed_is_the_checkpoint(tmp_path):
    with pytest.raises(FlapkitError):
        flapkit.push(tmp_path, "nobody/model")


@pytest.mark.parametrize("output", ["../x\0", "~nobody-of-this-name/x", "a" * 300])
def test_outputs_that_cannot_be(call, output):
    code, _, err = call("run", "recipe.yaml", "-q", output=output)
    assert (code, "cannot be used" in err) == (2, True), err


def test_errors_of_outputs_are_one_kind(tmp_path):
    for wrong in (tmp_path / ("a" * 300), tmp_path / "a\0"):
        with pytest.raises(OutputError, match="cannot be used"):
            check_output(wrong)
    with pytest.raises(ModelError):
        flapkit.load("~nobody-of-this-name/model")
