"""What the loggers are told, and that their files come along in the output folder."""

from __future__ import annotations

import csv

import pytest
from conftest import write_recipe

from flapkit.recipe.load import load_recipe
from flapkit.run.check import check
from flapkit.run.pipeline import run
from flapkit.system.errors import RecipeError


@pytest.fixture
def recipe(home):
    return write_recipe(home, trainer={"accelerator": "cpu", "logger": "csv"})


def test_csv(recipe, tmp_path):
    record = run(load_recipe(recipe))
    with (tmp_path / "out" / "logs" / "pruning" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    kept = {int(row["step"]): float(row["kept/mlp"]) for row in rows if row["kept/mlp"]}
    assert kept == {
        site.layer: len(record.plan.keep[site.name]) / site.units for site in record.target.sites if site.kind == "mlp"
    }
    (measured,) = record.perplexity.values()
    logged = {key: float(row[key]) for row in rows for key in row if key.startswith("perplexity/") and row[key]}
    assert logged == {f"perplexity/text.txt_ 32 tokens/{which}": measured[which] for which in ("dense", "pruned")}
    assert {float(row["parameters/removed"]) for row in rows if row["parameters/removed"]} == {record.params["removed"]}


def test_tensorboard_beside_csv(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    run(load_recipe(recipe, ["trainer.logger=[csv, tensorboard]"]))
    names = {path.name.split(".")[0] for path in (tmp_path / "out" / "logs" / "pruning").iterdir()}
    assert names >= {"metrics", "events", "hparams"}


def test_without_a_logger_there_is_no_log(recipe, tmp_path):
    run(load_recipe(recipe, ["trainer.logger=[]"]))
    assert not (tmp_path / "out" / "logs").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
@pytest.mark.parametrize("work", [run, check])
def test_a_missing_package_is_named_before_any_work(recipe, tmp_path, without, name, work):
    without(name)
    with pytest.raises(RecipeError, match=rf'pip install "flapkit\[{name}\]"'):
        work(load_recipe(recipe, [f"trainer.logger={name}"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_wandb_offline(recipe, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(load_recipe(recipe, ["trainer.logger=wandb"]))
    assert (tmp_path / "out" / "result.json").is_file()


# What MLflow and its database warn of is theirs.
@pytest.mark.filterwarnings("default")
@pytest.mark.slow
def test_mlflow_to_a_database(recipe, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run(load_recipe(recipe, ["trainer.logger=mlflow"]))
    (found,) = mlflow.search_runs(experiment_names=["flapkit"], output_format="list")
    assert any(name.startswith("kept/") for name in found.data.metrics)
