"""What a run is said to take: compute as counted, memory as measured, and a refusal where it is too much."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_llama, write_recipe
from executions import add_tokenizer
from torch.utils.flop_counter import FlopCounterMode

import flapkit
from flapkit.execution.executor import CalibrationText
from flapkit.execution.runtime import Runtime
from flapkit.execution.training import learn_plan
from flapkit.model.budget import Budget
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.pruning.collector import measure, run_batch
from flapkit.pruning.gram import Gram
from flapkit.pruning.statistics import size_of
from flapkit.recipe.load import load_recipe
from flapkit.run import estimate
from flapkit.run.budget import open_budget
from flapkit.run.dtypes import choose_dtypes
from flapkit.run.estimate import (
    calibration_flops,
    check_fits,
    empty_model,
    estimate_needs,
    memory_limit,
    search_flops,
)
from flapkit.run.target import find_target
from flapkit.system.errors import RecipeError

CPU = Runtime({"accelerator": "cpu"})
WATCHED = """
import sys
import flapkit.run.pipeline
from flapkit import cli
from pathlib import Path

def now(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))

print(now("VmRSS"))
sys.argv = ["flapkit", "run", "recipe.yaml", "--quiet", "--no-cache"]
try:
    cli.main()
finally:
    print(now("VmHWM"))
"""
"""Runs a recipe, and prints the resident memory of the program alone, and of the run at its peak."""

TEXT = "".join(f"def f{n}(model):\n    return model * {n}\n" for n in range(400))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Make the recipe of a saved model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)

    def make(model, **changes):
        model.save_pretrained("dense")
        add_tokenizer(tmp_path / "dense")
        asked = {
            "model": {"path": "dense"},
            "calibration": {"dataset": "text.txt", "samples": 6, "length": 24, "batch_size": 6},
            "budget": {"ratio": 0.3},
            "evaluate": {},
        }
        return load_recipe(write_recipe(tmp_path, **{**asked, **changes}))

    return make


def needs_of(recipe, processes=1):
    asked, target = recipe.recipe, find_target(recipe)
    dtypes = choose_dtypes(asked.model, target.config, torch.device("cpu"))
    empty = empty_model(target, dtypes)
    opened = open_budget(recipe, target, empty.num_parameters(), dtypes.saved)
    return estimate_needs(recipe, target, empty, opened.budget, dtypes, processes)


READ = """
import sys
import flapkit.run.pipeline
from pathlib import Path
from flapkit.checkpoint.load import load_tokenizer
from flapkit.recipe.load import load_recipe
from flapkit.run.target import find_target
from flapkit.run.text import read_text
from flapkit.text.windows import tokens_hash

def now(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(what))

recipe = load_recipe(Path("recipe.yaml"))
target, tokenizer = find_target(recipe), load_tokenizer(recipe.recipe.model.path)
before = now("VmRSS")
text = read_text(recipe.recipe, target, tokenizer)
tokens_hash(text.calibration)
print(now("VmHWM") - before)
"""
"""Reads the text of a recipe as a run does, and prints by how much the program grows meanwhile."""


SAMPLES = 1_000_000


def test_the_windows_are_counted_as_they_are(recipe, monkeypatch):
    # What this process takes changes from one call to the next, and is a part of both.
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=10**9)))
    calibration = {"dataset": "text.txt", "samples": SAMPLES, "length": 64}
    evaluate = {"perplexity": [{"dataset": "text.txt", "length": 24, "windows": 16}]}
    asked = recipe(make_llama(vocab_size=4096), calibration=calibration, evaluate=evaluate)
    few = recipe(make_llama(vocab_size=4096), calibration={**calibration, "samples": 1}, evaluate=evaluate)
    many = needs_of(asked).own - needs_of(few).own
    assert many == pytest.approx(8 * 64 * SAMPLES, rel=0.02)
    write_recipe(Path(), model={"path": "dense"}, calibration=calibration, evaluate=evaluate)
    done = subprocess.run([sys.executable, "-c", READ], stdout=subprocess.PIPE, check=True)
    assert many < int(done.stdout) < 1.4 * many + estimate.TEXT


def test_the_text_is_counted(recipe):
    asked = recipe(make_llama(), evaluate={"perplexity": [{"dataset": "large.txt", "length": 24, "windows": 16}]})
    Path("large.txt").write_text("a text\n")
    small = needs_of(asked).whole
    with Path("large.txt").open("wb") as file:
        file.truncate(10**9)
    needs = needs_of(asked)
    assert min(needs.whole, needs.least, needs.layerwise) > 40e9 > small
    with pytest.raises(RecipeError, match="memory"):
        check_fits(asked, needs, CPU)


def test_text_that_is_not_here_is_said(command, recipe):
    evaluate = {"perplexity": [{"dataset": "wikitext2", "length": 24, "windows": 2}]}
    recipe(make_llama(), evaluate=evaluate)
    code, out, _ = command("check", "recipe.yaml")
    assert (code, "not included: the text of wikitext2" in out) == (0, True)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_compute_is_what_is_counted(recipe, kind):
    model = make_llama() if kind == "llama" else tiny_model(tiny_config("mixtral"))
    model.set_attn_implementation("eager")
    if kind == "mixtral":
        # The counter knows no grouped products.
        model.set_experts_implementation("eager")
    asked = recipe(model)
    with FlopCounterMode(display=False) as counter:
        run_batch(model, {"input_ids": torch.randint(96, (6, 24), generator=torch.Generator().manual_seed(0))})
    # Rotations, norms and the choice of experts are left out.
    assert calibration_flops(asked, find_target(asked)) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_compute_of_a_training_is_what_is_counted(recipe):
    model = make_llama()
    model.set_attn_implementation("eager")
    gates = {"name": "gates", "steps": 2, "batch_size": 3, "validate_every": 1, "stand_in": "mean"}
    asked = recipe(model, searcher=gates, budget={"ratio": 0.3})
    target, tokens = find_target(asked), torch.randint(96, (6, 24), generator=torch.Generator().manual_seed(0))
    budget, batches = Budget.over(target.sites, 0.3), CalibrationText(tokens).batches()
    statistics = measure(model, target.sites, asked.searcher.measures(), batches)
    scores = {site.name: torch.arange(site.units, dtype=torch.float64)[:, None] for site in target.sites}
    trained = asked.searcher.gates(target.sites, scores, statistics, budget)
    with FlopCounterMode(display=False) as counter:
        learn_plan(model, target.sites, trained, asked.searcher.training, batches, CPU)
    assert search_flops(asked, target, budget) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_compute_of_trials_is_what_they_say(recipe):
    """Each runs the held-out windows through the pruned model, and all once through the dense one."""
    asked = recipe(make_llama(), searcher={"name": "evolution", "generations": 2}, budget={"ratio": 0.5})
    target, budget = find_target(asked), Budget.over(find_target(asked).sites, 0.5)
    few, many = (
        search_flops(replace(asked, searcher=replace(asked.searcher, generations=count)), target, budget)
        for count in (1, 11)
    )
    tokens, passes = 24, 10 * (0.25 * asked.searcher.children + asked.searcher.survivors)
    head, attention = 32 * 96, 2 * 24 * sum(site.channels for site in target.sites if site.kind == "attention")
    left = sum(site.params for site in target.sites) - budget.params
    assert many - few == pytest.approx(2 * passes * tokens * (left + head + attention))
    assert not search_flops(asked, target, Budget.over(target.sites, 0))


def test_gradients_cost_a_backward_pass(recipe):
    plain, gradient = (recipe(make_llama(), metric=metric) for metric in ("wifv", "taylor"))
    target = find_target(plain)
    assert calibration_flops(gradient, target) == 3 * calibration_flops(plain, target)


def test_layerwise_takes_less_of_a_deep_model(recipe):
    shape = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096}
    shallow, deep = (needs_of(recipe(make_llama(num_hidden_layers=layers, **shape))) for layers in (2, 8))
    grows = deep.whole - deep.own - (shallow.whole - shallow.own)
    assert grows > 6 * 4 * 1_000_000
    assert deep.layerwise - deep.own - (shallow.layerwise - shallow.own) < grows / 5
    assert deep.weights > shallow.weights > 0


def test_hidden_states_on_the_disk(recipe):
    memory, disk = (
        needs_of(recipe(make_llama(), execution={"mode": "layerwise", "hidden_states": where}))
        for where in ("memory", "disk")
    )
    assert disk.disk - memory.disk == 2 * 6 * 24 * 32 * 4


def test_the_disk_of_a_search_layer_by_layer(recipe):
    """The statistics of all sites, and their repaired consumers eight times."""
    model, method = make_llama(), {"compensator": {"name": "least_squares", "ridge": 0.01}, "budget": {"ratio": 0.3}}
    ranked, searched, whole = (
        needs_of(recipe(model, searcher=searcher, execution=mode, **method)).disk
        for searcher, mode in (("al_am", "layerwise"), ("evolution", "layerwise"), ("evolution", "whole"))
    )
    sites = flapkit.sites(model)
    consumers = sum(4 * (site.channels + 1) * site.out_features for site in sites)
    assert searched - ranked == size_of([Gram], sites) + 8 * consumers
    assert whole == ranked


def test_what_does_not_fit_is_refused(recipe, monkeypatch):
    asked = recipe(make_llama())
    needs = needs_of(asked)
    monkeypatch.setattr(estimate, "memory_limit", lambda processes: needs.least)
    check_fits(asked, needs, CPU)
    monkeypatch.setattr(estimate, "memory_limit", lambda processes: needs.least - 1)
    with pytest.raises(RecipeError, match=r"needs about .* GB of memory; .*`execution: layerwise` needs"):
        check_fits(asked, needs, CPU)


def test_processes_share_the_memory_and_the_windows(recipe, monkeypatch):
    asked = recipe(make_llama(), execution="layerwise")
    alone, two = needs_of(asked), needs_of(asked, processes=2)
    assert alone.layerwise - alone.own - (two.layerwise - two.own) == 6 * 24 * 32 * 4 / 2
    whole, half = memory_limit(), memory_limit(2)
    assert half == whole // 2
    monkeypatch.setattr(estimate, "memory_limit", lambda processes: two.layerwise - 1)
    runtime = Runtime({"accelerator": "cpu", "devices": 2})
    with pytest.raises(RecipeError, match=r"GB of memory in each of 2 processes; .* GB available to each; --force"):
        check_fits(asked, two, runtime)


@pytest.mark.parametrize("words", [("check",), ("run", "-q")])
def test_force_goes_on(recipe, command, monkeypatch, words):
    recipe(make_llama(vocab_size=4096))
    monkeypatch.setattr(estimate, "memory_limit", lambda processes=1: 1)
    code, _, said = command(*words, "recipe.yaml")
    assert code == 2
    assert "--force runs it anyway" in said
    assert command(*words, "recipe.yaml", "--force")[0] == 0


def test_the_limits_of_a_process_count(monkeypatch):
    whole = memory_limit()
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (12345, resource.RLIM_INFINITY))
    assert memory_limit() == 12345 < whole


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("54321\n")
    monkeypatch.setattr(estimate, "CGROUPS", (str(tmp_path / "memory.max"), str(tmp_path / "absent")))
    assert memory_limit() == 54321
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit() > 54321


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["whole", "layerwise"])
def test_the_memory_is_what_is_measured(recipe, mode):
    """Within 20 % of the resident peak of a run in a process of its own."""
    model = make_llama(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=10,
        num_attention_heads=12,
        num_key_value_heads=12,
        initializer_range=0.02,
    )
    evaluate = {"perplexity": [{"dataset": "text.txt", "length": 24, "windows": 16}]}
    asked = recipe(model, execution=mode, evaluate=evaluate)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", WATCHED], env=environment, capture_output=True, check=True)
    bare, peak = map(int, done.stdout.split())
    needs = needs_of(asked)
    expected = (needs.whole if mode == "whole" else needs.layerwise) - needs.own + bare + estimate.TEXT
    assert expected == pytest.approx(peak, rel=0.2)
