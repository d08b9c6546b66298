"""The command line, as a user meets it: what it prints, and its exit codes."""

from __future__ import annotations

import json
import re
import shlex
from types import SimpleNamespace

import pytest
from conftest import write_recipe

from flapkit.cli.check import _compute

METRIC = """
from dataclasses import dataclass
import torch
from flapkit import hookimpl
from flapkit.pruning.components import ImportanceMetric

@dataclass(frozen=True)
class Mine(ImportanceMetric):
    name = "mine"

    def score(self, site, stats, weight):
        return {score}

@hookimpl
def {hook}():
    return [Mine]
"""


def test_run_then_show(command, home):
    code, out, err = command("run", write_recipe(home))
    assert (code, "block parameters" in out) == (0, True), err
    files = {path.name for path in (home / "out").iterdir()}
    assert {
        "model.safetensors",
        "plan.json",
        "result.json",
        "recipe.yaml",
        "flapkit.json",
        "structure.png",
        "report.html",
    } <= files
    result = json.loads((home / "out" / "result.json").read_text())
    assert result["params"]["dense"] - result["params"]["removed"] <= result["params"]["pruned"]
    assert set(result["seconds"]) >= {"load", "calibrate", "prune", "evaluate dense", "evaluate pruned"}
    # The commands at the end, which the report has too, are true for this folder.
    steps = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert steps["serve"] == "vllm serve out --trust-remote-code"
    assert {"load", "measure", "train"} <= steps.keys()
    assert "vllm serve out --trust-remote-code" in (home / "out" / "report.html").read_text()
    code, _, err = command(*shlex.split(steps["export"])[1:])
    assert code == 0, err
    code, out, _ = command("show", "out")
    assert code == 0
    assert "of 512" in out
    assert "mix" not in out
    removed = [float(share) for share in re.findall(r"([\d.]+)%", out)]
    assert len(removed) == 6
    assert sum(removed) / len(removed) == pytest.approx(20, abs=1)
    code, _, err = command("run", home / "recipe.yaml")
    assert code == 2
    assert "exists already" in err
    assert command("run", home / "recipe.yaml", "--overwrite", "--quiet")[:2] == (0, "")


def test_the_resolved_recipe_gives_the_same_plan(command, home):
    assert command("run", write_recipe(home), "-q")[0] == 0
    assert command("run", home / "out" / "recipe.yaml", "--set", "output=again", "-q")[0] == 0
    assert (home / "out" / "plan.json").read_text() == (home / "again" / "plan.json").read_text()


def test_cache(command, home):
    assert command("run", write_recipe(home), "-q", "--no-cache")[0] == 0
    assert "0 files" in command("cache")[1]
    assert command("run", home / "recipe.yaml", "-q", "--overwrite")[0] == 0
    code, out, _ = command("cache")
    assert (code, "1 file," in out, "Moments" in out) == (0, True, True)
    assert "1 file removed" in command("cache", "--clear")[1]
    assert "0 files" in command("cache")[1]


def test_check(command, home):
    code, out, err = command("check", write_recipe(home))
    assert code == 0, err
    assert "530,842 of 2,654,208 parameters of blocks" in out
    assert re.search(r"TFLOP for calibration: .* here", out)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(20, "less than a minute"), (70, "about 1 min 10 s"), (9000, "about 2 h 30 min")],
)
def test_how_long_a_run_computes(seconds, said):
    needs = SimpleNamespace(flops=seconds * 2e9, search_flops=seconds * 8e9)
    assert _compute(needs, 1e10).endswith(f" TFLOP for the search: {said} here")


@pytest.mark.parametrize("execution", ["whole", "layerwise"])
def test_check_takes_a_pruned_model(command, home, execution):
    assert command("run", write_recipe(home), "--no-cache")[0] == 0
    path = write_recipe(home, "again.yaml", model={"path": "out", "dtype": "float32"}, execution=execution, output="b")
    code, out, err = command("check", path)
    assert (code, "is valid" in out) == (0, True), err


@pytest.mark.parametrize("kind", ["metrics", "searchers", "compensators", "adapters", "datasets", "recipes", "sweeps"])
def test_list(command, kind):
    code, out, _ = command("list", kind)
    assert code == 0
    named = {"metrics": "wifv", "searchers": "al_am", "compensators": "bias", "adapters": "vicuna"}
    assert {**named, "datasets": "wikitext2", "recipes": "demo", "sweeps": "ablation"}[kind] in out


def test_list_keeps_formulas(command):
    assert "sqrt(E[x_j²])" in command("list", "metrics")[1]


def test_schema_is_json(command):
    code, out, _ = command("schema")
    assert code == 0
    assert "properties" in json.loads(out)


def test_usage_error(command):
    code, _, err = command("prune")
    assert code == 2
    assert "No such command" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrc": "wifv"}, "did you mean"),
        ({"metric": "wifw"}, "did you mean 'wifv'"),
        ({"searcher": {"name": "al_am", "min_unit": 2}}, "min_units"),
        ({"budget": {"ratio": 0}}, "is not a ratio"),
        ({"budget": {"ratio": 1}}, "is not a ratio"),
        ({"budget": {"ratio": -0.5}}, "is not a ratio"),
        ({"budget": {"ratio": float("nan")}}, "ratio"),
        ({"budget": {"ratio": 0.99}}, "the largest ratio of blocks"),
        (
            {"budget": {"params": "1K"}},
            "budget.params: 1K: the parts that cannot be pruned (embeddings, norms, head) have",
        ),
        ({"budget": {"memory": "1TB"}}, "budget.memory: 1TB: the dense model has only"),
        ({"budget": {"kv_cache": 0.01}}, "the smallest kv_cache is"),
        ({"budget": {"active_params": "2M"}}, "models of type 'llama' have no experts"),
        ({"model": {"path": "./nowhere"}}, "folder not found"),
        ({"calibration": {"dataset": "text.txt", "length": 100000}}, "calibration"),
        ({"calibration": {"dataset": "text.tx"}}, "text.tx"),
        ({"trainer": {"accelerator": "cuda"}}, "trainer"),
        ({"plugins": ["./missing.py"]}, "file not found"),
    ],
)
def test_bad_recipes(command, home, changes, message):
    code, _, err = command("run", write_recipe(home, **changes))
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    ("score", "hook", "message"),
    [
        ("weight.sum()", "flapkit_metrics", "expected scores"),
        ("torch.full((site.units, 1), torch.nan)", "flapkit_metrics", "not finite"),
        ("torch.ones(site.units, 1)", "flapkit_metric", "did you mean 'flapkit_metrics'"),
        ("1 +", "flapkit_metrics", "fails to import"),
    ],
)
def test_bad_plugins(command, home, score, hook, message):
    (home / "mine.py").write_text(METRIC.replace("{score}", score).replace("{hook}", hook))
    code, _, err = command("run", write_recipe(home, metric="mine", plugins=["./mine.py"]))
    assert code == 2, err
    assert message in err
    assert not (home / "out").exists()


def test_a_metric_from_gradients(command, home):
    code, _, err = command("run", write_recipe(home, metric={"name": "taylor", "form": "vector"}))
    assert code == 0, err
    assert json.loads((home / "out" / "flapkit.json").read_text())["metric"] == {"name": "taylor", "form": "vector"}


def test_a_saved_plan_beside_the_recipe(command, home):
    assert command("run", write_recipe(home), "-q")[0] == 0
    (home / "elsewhere").mkdir()
    (home / "elsewhere" / "mine.json").write_text((home / "out" / "plan.json").read_text())
    path = write_recipe(
        home / "elsewhere", searcher={"name": "plan", "path": "mine.json"}, output="again", compensator="none"
    )
    assert command("check", path)[0] == 0
    code, _, err = command("run", path)
    assert code == 0, err
    assert (home / "out" / "plan.json").read_text() == (home / "again" / "plan.json").read_text()
    assert command("run", home / "again" / "recipe.local.yaml", "--set", "output=third", "-q")[0] == 0
    code, _, err = command("check", path, "--set", "budget.ratio=0.3", "--overwrite")
    assert (code, "set budget.ratio to 0.1998" in err) == (2, True), err


def test_a_plan_that_is_not_there(command, home):
    code, _, err = command("run", write_recipe(home, searcher={"name": "plan", "path": "mine.json"}))
    assert code == 2
    assert f"searcher.path: file not found: {home / 'mine.json'}" in err


def test_a_clash(command, home):
    clash = METRIC.replace("{score}", "weight").replace("{hook}", "flapkit_metrics").replace('"mine"', '"wifv"')
    (home / "mine.py").write_text(clash)
    code, _, err = command("run", write_recipe(home, plugins=["./mine.py"]))
    assert code == 2
    assert "two plugins offer a metric named 'wifv'" in err


def test_a_metric_of_ones_own(command, home):
    own = METRIC.replace("{score}", "weight.abs().sum(dim=0).view(site.units, -1)").replace("{hook}", "flapkit_metrics")
    (home / "mine.py").write_text(own)
    code, _, err = command("run", write_recipe(home, metric="mine", plugins=["./mine.py"]), "-q")
    assert code == 0, err
    assert json.loads((home / "out" / "flapkit.json").read_text())["metric"]["name"] == "mine"


def test_an_architecture_that_nobody_declared(command, home):
    from transformers import MambaConfig, StableLmConfig

    from flapkit.checkpoint.load import load_tokenizer

    StableLmConfig().save_pretrained(home / "stablelm")
    load_tokenizer("builtin:tiny-llama").save_pretrained(home / "stablelm")
    code, out, err = command("check", write_recipe(home, model={"path": "./stablelm"}, adapter="auto"))
    assert code == 0, err
    assert "auto (derived and verified): 64 sites (attention, mlp)" in " ".join(out.split())
    MambaConfig().save_pretrained(home / "mamba")
    code, _, err = command("check", write_recipe(home, model={"path": "./mamba"}))
    assert code == 2
    assert "no plugin declares models of type 'mamba'" in err
    assert "the model has no attention layers" in err


ERNIE = """
name: my_ernie
model_types: [ernie4_5]
layers: model.layers
blocks:
  - kind: attention
    path: self_attn
    consumer: o_proj
    parameters: {q_proj: q, k_proj: k, v_proj: k}
    attributes: {num_key_value_groups: H//K}
  - {kind: mlp, path: mlp, consumer: down_proj, parameters: {gate_proj: i, up_proj: i}}
"""


def test_a_declaration_is_verified_before_any_weights_are_read(command, home):
    from flapkit.checkpoint.load import load_tokenizer
    from flapkit.model.tiny import tiny_config

    tokenizer = load_tokenizer("builtin:tiny-llama")
    tiny_config("ernie4_5", vocab_size=len(tokenizer)).save_pretrained(home / "mine")
    tokenizer.save_pretrained(home / "mine")
    recipe = write_recipe(home, model={"path": "./mine"}, plugins=["./ernie.yaml"])
    (home / "ernie.yaml").write_text(ERNIE)
    code, out, err = command("check", recipe)
    assert code == 0, err
    assert "my_ernie (declared and verified)" in out
    (home / "ernie.yaml").write_text(ERNIE.replace(", up_proj: i", ""))
    for verb in ("check", "run"):
        code, _, err = command(verb, recipe)
        assert code == 2
        assert "the declaration of adapter 'my_ernie' is wrong for models of type 'ernie4_5'" in err
        assert "layers.0.mlp: the sliced model does not run; the declaration does not name" in err


@pytest.mark.slow
def test_check_adapter_tells_refused_forms_from_failures(command, home):
    (home / "ernie.yaml").write_text(ERNIE)
    code, out, err = command("check-adapter", "ernie4_5", "--plugin", "ernie.yaml")
    assert code == 0, err
    assert "all 65 checks passed" in out
    code, out, err = command("check-adapter", "stablelm")
    assert code == 0, err
    assert "refused, so that they are never pruned: models of the forms norms of heads" in out
    assert "model_types: [stablelm]" in out


def test_the_declaration_that_was_derived_is_recorded(command, home):
    from flapkit.checkpoint.load import load_tokenizer
    from flapkit.model.tiny import tiny_config, tiny_model

    tokenizer = load_tokenizer("builtin:tiny-llama")
    tiny_model(tiny_config("stablelm", vocab_size=len(tokenizer))).save_pretrained(home / "mine")
    tokenizer.save_pretrained(home / "mine")
    code, _, err = command("run", write_recipe(home, model={"path": "./mine"}), "-q")
    assert code == 0, err
    made = json.loads((home / "out" / "flapkit.json").read_text())
    assert made["adapter"] == "auto"
    assert made["declaration"]["blocks"][1]["parameters"] == {"gate_proj": "i", "up_proj": "i"}


def test_an_adapter_that_does_not_fit(command, home):
    from transformers import MambaConfig

    MambaConfig().save_pretrained(home / "mamba")
    code, _, err = command("check", write_recipe(home, model={"path": "./mamba"}, adapter="llama"))
    assert code == 2
    assert "adapter 'llama': MambaForCausalLM has no module model.layers" in err


def test_ctrl_c_in_calibration(command, home, monkeypatch):
    from flapkit.execution.lightning.module import CausalLM

    def interrupted(self, batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(CausalLM, "predict_step", interrupted)
    code, _, err = command("run", write_recipe(home))
    assert code == 130
    assert "interrupted" in err
    # What was measured of the dense model is kept for --resume.
    assert sorted(path.name for path in home.iterdir()) == [".out.work", "recipe.yaml", "text.txt"]


def test_activations_that_are_not_finite(command, home):
    import torch

    from flapkit.checkpoint.load import load, load_tokenizer

    model = load("builtin:tiny-llama")
    with torch.no_grad():
        weight = model.model.layers[2].mlp.up_proj.weight
        weight[3] = torch.finfo(weight.dtype).max
    model.save_pretrained(home / "broken")
    load_tokenizer("builtin:tiny-llama").save_pretrained(home / "broken")
    code, _, err = command("run", write_recipe(home, model={"path": "./broken", "dtype": "float16"}, evaluate={}))
    assert code == 1
    assert "model.layers.2.mlp.down_proj: its input is not finite" in err


def test_sweep(command, home):
    from sweeps import write_sweep

    path = write_sweep(home, points=[{"budget.ratio": 0.99}])
    code, out, err = command("sweep", path)
    assert code == 1
    assert "1 of 5 points failed\nbudget.ratio=0.99: BudgetError" in err
    assert "magnitude" in out
    assert {path.name for path in (home / "out").iterdir()} == {"results.jsonl", "table.csv", "plot.png", "plot.svg"}
    write_sweep(home)
    assert command("sweep", path, "--output", "out", "-q")[:2] == (0, "")
    assert len((home / "out" / "results.jsonl").read_text().splitlines()) == 5
    code, _, err = command("sweep", path, "--set", "metrc=wifv")
    assert (code, "did you mean 'metric'" in err) == (2, True)


def test_a_quiet_run_notes_its_warnings(command, home):
    """The text that is evaluated is the one that was calibrated on."""
    code, out, err = command("run", write_recipe(home), "--quiet")
    assert (code, out, err) == (0, "", "")
    assert "its perplexity is too low" in json.loads((home / "out" / "result.json").read_text())["warnings"][0]
