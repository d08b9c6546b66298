"""What a run keeps, and that a run which goes on ends as one that was never stopped."""

from __future__ import annotations

import pytest
import torch
import yaml
from conftest import make_llama

import flapkit
from flapkit.evaluation.scores import Score, TaskScores
from flapkit.execution.executor import record_of, repairs_of
from flapkit.execution.resume import ResumeStore
from flapkit.model.surgery import Correction
from flapkit.pruning.collector import Collector, run_batch
from flapkit.pruning.method import Repairs
from flapkit.pruning.statistics import Moments
from flapkit.recipe.load import load_recipe
from flapkit.run.pipeline import run
from flapkit.system.errors import OutputError
from flapkit.system.workdir import open_workdir

RECIPE = {
    "model": {"path": "model", "dtype": "float32"},
    "calibration": {"dataset": "text.txt", "samples": 24, "length": 16, "batch_size": 2, "save_every": 0},
    "budget": {"ratio": 0.3},
    "report": {"error_windows": 0},
    "trainer": {"accelerator": "cpu"},
    "output": "out",
}
PASSES = ["calibration.statistics_memory=15KB", "compensator=least_squares"]
SETTINGS = {
    "one pass": [],
    "gradient": ["metric=taylor"],
    "passes": PASSES,
    "sequential": [*PASSES, "calibration.sequential=true"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_llama(vocab_size=2048).save_pretrained(folder)
    flapkit.checkpoint.load.load_tokenizer("builtin:tiny-llama").save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "text.txt").write_text("".join(f"def f{n}(model):\n    return model * {n}\n" for n in range(200)))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


class Died(BaseException):
    """Stands for what ends a process."""


def count_batches(patched, die_at=None):
    """Count the batches that are run, as they come; die before one of them, counted from 0."""
    ran, run_whole = [], run_batch

    def counted(*args, **kwargs):
        if len(ran) == die_at:
            raise Died
        ran.append(args)
        run_whole(*args, **kwargs)

    patched.setattr("flapkit.execution.lightning.module.run_batch", counted)
    return ran


def counted_run(recipe, die_at=None, **options):
    """Run a recipe; return how many batches of calibration that took."""
    with pytest.MonkeyPatch.context() as patched:
        ran = count_batches(patched, die_at)
        if die_at is None:
            run(recipe, **options)
        else:
            with pytest.raises(Died):
                run(recipe, **options)
    return len(ran)


def same(one, other):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in ("plan.json", "model.safetensors"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_calibration_goes_on_batch_by_batch(home, setting):
    changes = SETTINGS[setting]
    batches = counted_run(load_recipe("recipe.yaml", [*changes, "output=whole"]))
    assert batches == {"one pass": 12, "gradient": 12, "passes": 48, "sequential": 48}[setting]
    for stopped in (1, 2 * batches // 3 + 1):
        recipe = load_recipe("recipe.yaml", [*changes, f"output=out{stopped}"])
        assert counted_run(recipe, stopped) == stopped
        assert counted_run(recipe, resume=True) == batches - stopped
        assert same(home / f"out{stopped}", home / "whole")
    assert list(home.glob(".*")) == []


@pytest.mark.parametrize("stopped", [5, 33])
def test_a_damaged_file_is_named_and_made_anew_once_it_is_removed(home, stopped):
    """Stopped in the first pass, it has statistics; later, it has scores as well."""
    run(load_recipe("recipe.yaml", [*PASSES, "output=whole"]))
    recipe = load_recipe("recipe.yaml", PASSES)
    counted_run(recipe, stopped)
    files = sorted((home / ".out.work").glob("*.safetensors"))
    content = files[0].read_bytes()
    files[0].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(OutputError, match=f"{files[0].name}: this file of an interrupted run is damaged"):
        run(recipe, resume=True)
    files[0].unlink()
    run(recipe, resume=True)
    assert same(home / "out", home / "whole")


def test_stopped_again_and_again(home):
    run(load_recipe("recipe.yaml", ["output=whole"]))
    recipe = load_recipe("recipe.yaml")
    assert [counted_run(recipe, 5, resume=True) for _ in range(2)] == [5, 5]
    assert counted_run(recipe, resume=True) == 2
    assert same(home / "out", home / "whole")


def test_a_stop_behind_calibration(home, monkeypatch):
    """As in the search, or while the output is written: nothing is run again."""
    run(load_recipe("recipe.yaml", ["output=whole"]))
    with monkeypatch.context() as patched:
        patched.setattr("flapkit.run.pipeline.save_run", lambda *args, **kwargs: (_ for _ in ()).throw(Died))
        assert_dies(load_recipe("recipe.yaml"))
    assert counted_run(load_recipe("recipe.yaml"), resume=True) == 0
    assert same(home / "out", home / "whole")


def assert_dies(recipe, **options):
    with pytest.raises(Died):
        run(recipe, **options)
    assert list(recipe.path.parent.glob(f".{recipe.recipe.output}.work"))


def test_nothing_is_kept_of_what_took_no_time(home):
    """Ten minutes are the default: a run that stopped sooner is simply begun again."""
    recipe = load_recipe("recipe.yaml", ["calibration.save_every=10"])
    assert counted_run(recipe, 5) == 5
    assert list(home.glob(".*")) == []


def test_statistics_are_saved_when_it_is_time(tmp_path, tokens):
    now = [0.0]
    model = make_llama()
    sites = flapkit.sites(model)
    with open_workdir(tmp_path / "out") as work:
        states = ResumeStore(work, 1.0, lambda: now[0]).states("all")
        with Collector(model, sites, [Moments]) as collector:
            assert states.begin(collector, sites, 0, 1) == 0
            for batch, seconds in enumerate([30.0, 30.0, 30.0, 59.0], start=1):
                now[0] += seconds
                collector.begin({"input_ids": tokens[:4]})
                run_batch(model, {"input_ids": tokens[:4]})
                states.save(collector, batch)
                saved = work.path("statistics-0-of-1.safetensors")
                assert saved.exists() == (batch >= 2)
            resumed = open_states(work, collector, sites, model)
        assert resumed == 4
        work.finish()


def open_states(work, measured, sites, model):
    work.resumed = True
    again = Collector(model, sites, [Moments])
    batches = ResumeStore(work, 1.0).states("all").begin(again, sites, 0, 1)
    assert ResumeStore(work, 1.0).states("another pass").begin(Collector(model, sites, [Moments]), sites, 0, 1) == 0
    for site in sites:
        one, other = (each.statistics[site.name][Moments] for each in (measured, again))
        assert one.metric_state.keys() == other.metric_state.keys()
        assert all(torch.equal(value, other.metric_state[name]) for name, value in one.metric_state.items())
    return batches


def test_statistics_that_cannot_be_saved_do_not_stop_a_run(home, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flapkit.execution.resume.write_tensors", full)
    run(load_recipe("recipe.yaml"))
    assert "the statistics so far cannot be saved for a run that goes on" in caplog.text


def test_figures_of_the_dense_model_are_measured_once(home, monkeypatch):
    recipe = load_recipe("recipe.yaml", ["evaluate.perplexity=[{dataset: text.txt, length: 16, windows: 2}]"])
    assert counted_run(recipe, 3) == 3
    names = []
    whole = flapkit.execution.whole.evaluate

    def evaluate(model, texts, runtime, name):
        names.append(name)
        return whole(model, texts, runtime, name)

    monkeypatch.setattr("flapkit.execution.whole.evaluate", evaluate)
    record = run(recipe, resume=True)
    assert names == ["evaluate pruned"]
    assert record.perplexity == run(recipe, overwrite=True).perplexity


def test_figures_round_trip(tmp_path):
    asked = TaskScores("rows.jsonl", 2, "ab", 0, 0, {"acc": Score(0.5, None, (0.0, 1.0))})
    with open_workdir(tmp_path / "out", resume=True) as work:
        kept = ResumeStore(work, 0)
        for _ in range(2):
            assert kept.figures("tasks", dict[str, TaskScores], lambda: {"boolq": asked}) == {"boolq": asked}
        assert kept.figures("tasks", dict[str, TaskScores], dict) == {"boolq": asked}
        assert kept.figures("none", list[str], list) == []
        assert work.records() == ["tasks.json"]
        work.finish()


def test_pieces_round_trip(tmp_path):
    repair = Repairs({"a/b": Correction(torch.ones(2, 3), None, "why"), "c": Correction()}, {"a/b": 0.1, "c": None})
    with open_workdir(tmp_path / "out", resume=True) as work:
        for make in (lambda: record_of(repair), pytest.fail):
            found = repairs_of(ResumeStore(work, 0).find("repair from a/b", make))
            assert found.expected == repair.expected
            assert found.corrections["c"] == Correction()
            assert found.corrections["a/b"].note == "why"
            assert torch.equal(found.corrections["a/b"].weight, torch.ones(2, 3))
        work.finish()


def test_check_tells_what_a_stopped_run_has_left(home, command, caplog):
    counted_run(load_recipe("recipe.yaml"), 3)
    code, out, err = command("check", "recipe.yaml")
    assert code == 0, err
    assert "has left statistics-0-of-1.safetensors; --resume goes on with it" in out
    code, _, err = command("run", "recipe.yaml")
    assert (code, "(statistics-0-of-1.safetensors); --resume goes on with it, --overwrite removes" in err) == (2, True)
    code, _, err = command("run", "recipe.yaml", "--resume", "--set", "budget.ratio=0.4")
    assert (code, "used a different recipe: budget.ratio: 0.3 then, 0.4 now" in err) == (2, True)
    assert command("run", "recipe.yaml", "--resume")[0] == 0
    assert "calibration goes on behind batch 3" in caplog.text


def test_a_text_that_changed_meanwhile(home):
    recipe = load_recipe("recipe.yaml")
    counted_run(recipe, 3)
    (home / "text.txt").write_text((home / "text.txt").read_text().replace("model", "other"))
    with pytest.raises(flapkit.system.errors.OutputError, match=r"used a different recipe: text\.calibration:"):
        run(recipe, resume=True)
    run(recipe, overwrite=True)
