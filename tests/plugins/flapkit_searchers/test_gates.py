"""Gates: exact budgets in every step, stand-ins that are least squares, and the same plan for the same seed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_llama
from lightning.pytorch import Callback
from planted import random_scores
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import flapkit
from flapkit import api
from flapkit.execution import training as stage
from flapkit.execution.executor import CalibrationText
from flapkit.execution.lightning.module import GatedLM, Optimization
from flapkit.execution.runtime import Runtime
from flapkit.execution.training import Workplace, learn_plan
from flapkit.model.budget import Budget
from flapkit.model.surgery import Correction, apply_plan_
from flapkit.pruning.algorithm import find_plan
from flapkit.pruning.collector import measure
from flapkit.pruning.gates import GatedModel
from flapkit.pruning.gram import Gram
from flapkit.pruning.moments import Moments
from flapkit.pruning.recovery import divergence, next_token_loss
from flapkit.registry import SEARCHER, Registry
from flapkit.system.errors import CalibrationError, InputError, ModelError, RunError

CPU = {"accelerator": "cpu", "devices": 1}
REGISTRY = Registry.load()
SHORT = {"steps": 8, "lr": 0.1, "validate_every": 4, "refresh": 3, "validation_windows": 4}


@pytest.fixture
def windows():
    """Draw windows that count upwards."""
    start = torch.randint(0, 96, (16, 1), generator=torch.Generator().manual_seed(0))
    return (start + torch.arange(16)) % 96


def searcher(**options):
    return REGISTRY.create(SEARCHER, "gates", {**SHORT, **options})


def gated(model, windows, ratio=0.4, **options):
    """Return a model's sites, a budget, and the gates to train."""
    chosen, sites = searcher(**options), flapkit.sites(model)
    budget = Budget.over(sites, ratio)
    statistics = measure(model, sites, chosen.measures(), CalibrationText(windows).batches())
    return sites, budget, chosen.gates(sites, random_scores(sites), statistics, budget)


def learn(windows, *, workplace=None, runtime=None, ratio=0.4, **options):
    model = make_llama()
    sites, budget, gates = gated(model, windows, ratio, **options)
    batches, runtime = CalibrationText(windows).batches(), runtime or Runtime(CPU)
    training = searcher(**options).training
    return sites, budget, learn_plan(model, sites, gates, training, batches, runtime, workplace=workplace)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.7])
def test_every_forward_pass_meets_the_budget(windows, ratio, kv_heads):
    model = make_llama(num_key_value_heads=kv_heads)
    sites, budget, gates = gated(model, windows, ratio)
    largest = max(site.params_per_unit for site in sites)
    for seed in range(3):
        gates.values.data = torch.randn(len(gates.values), generator=torch.Generator().manual_seed(seed))
        gates.train()
        gates.update()
        assert 0 <= budget.params - gates.plan().removed_params(sites) < largest


@pytest.mark.parametrize("stand_in", ["fit", "mean"])
def test_the_gated_model_is_the_repaired_one(windows, stand_in):
    """With the fit: repaired by least squares; with the mean: by FLAP's bias."""
    model = make_llama()
    sites, _, gates = gated(model, windows, stand_in=stand_in)
    statistics = measure(model, sites, [Gram, Moments], CalibrationText(windows).batches())
    plan = gates.plan()
    corrections = {}
    for site in sites:
        gram, weight = statistics[site.name][Gram], model.get_parameter(site.weight).double()
        kept, closed = (torch.tensor(site.channels_of(u)) for u in (plan.keep[site.name], plan.removed_units(site)))
        covariance = gram.covariance[0]
        mean = gram.mean if stand_in == "fit" else statistics[site.name][Moments].mean
        inner = covariance[kept[:, None], kept]
        inner.diagonal().add_(0.01 * covariance.diagonal().mean())
        fit = covariance[closed][:, kept] @ inner.inverse() * (stand_in == "fit")
        bias = weight[:, closed] @ (mean[closed] - fit @ mean[kept])
        corrections[site.name] = Correction(weight[:, kept] + weight[:, closed] @ fit, bias)
    gates.eval()
    handle = GatedModel(model, sites, gates)
    with torch.no_grad():
        found = model(windows[:4]).logits
        handle.remove_()
        apply_plan_(model, sites, plan, corrections)
        assert torch.allclose(found, model(windows[:4]).logits, atol=1e-4)


def test_a_gate_feels_what_the_others_cannot_reproduce(windows):
    """A channel that is the sum of others can go: its gate has no gradient, be it open or closed."""
    model = make_llama()
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        for linear in (layer.gate_proj, layer.up_proj):
            linear.weight[3] = linear.weight[5]
    sites, _, gates = gated(model, windows, 0.1)
    gates.values.data[:] = 1.0
    gates.train()
    handle = GatedModel(model, sites, gates)
    gates.update()
    site = next(site for site in sites if site.name == "layers.0.mlp")
    x = torch.randn(2, 8, site.channels)
    x[..., 3] = x[..., 5]
    residual = x - gates._stand_ins[site.name](x, torch.ones(site.channels))
    handle.remove_()
    assert residual[..., 3].abs().mean() < 0.1 * residual[..., 7].abs().mean()


def test_training_lowers_the_loss_and_leaves_the_model(windows):
    model = make_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sites, budget, gates = gated(model, windows)
    batches = CalibrationText(windows).batches()
    learned = learn_plan(model, sites, gates, searcher(steps=24, validate_every=8).training, batches, Runtime(CPU))
    assert learned.validations[learned.best_step] < learned.validations[0]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert 0 <= budget.params - learned.plan.removed_params(sites) < max(site.params_per_unit for site in sites)


def test_the_seed_decides(windows):
    first, other = (learn(windows, seed=seed)[2] for seed in (0, 1))
    assert first.validations != other.validations


class Kill(Callback):
    """Stop a training as a kill would, after some step."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5:
            raise SystemError("killed")


def test_a_resumed_training_is_as_one_that_was_not_stopped(windows, tmp_path, monkeypatch):
    expected = learn(windows)[2]
    workplace = Workplace(tmp_path, {"training": "this training"})
    with monkeypatch.context() as patched:
        watching = stage.recovery_callbacks
        patched.setattr(stage, "recovery_callbacks", lambda *a, **k: [Kill(), *watching(*a, **k)])
        with pytest.raises(SystemError):
            learn(windows, workplace=workplace)
    assert workplace.checkpoint.is_file()
    assert learn(windows, workplace=workplace)[2] == expected


def test_processes_send_each_other_no_buffers(windows):
    """All have the same: before the first step, and once the stand-ins are fitted."""
    model = make_llama()
    sites, _, gates = gated(model, windows)
    module = GatedLM(model, GatedModel(model, sites, gates), Optimization())
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(module)
        gates.update()
        parallel._assign_modules_buffers()
        assert sum(name.endswith(".matrix") for name, _ in module.named_buffers()) == len(sites)
        assert parallel.modules_buffers == []
    finally:
        distributed.destroy_process_group()


def test_accumulated_batches_are_one_batch(windows):
    """One step over two batches of two windows is one over four."""
    accumulated = Runtime({**CPU, "accumulate_grad_batches": 2})
    whole = learn(windows, steps=4, validate_every=4, batch_size=4, refresh=99)[2]
    parts = learn(windows, steps=4, validate_every=4, batch_size=2, refresh=99, runtime=accumulated)[2]
    assert math.isclose(whole.validations[4], parts.validations[4], rel_tol=1e-4)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-3)


def test_bfloat16(windows):
    learned = learn(windows, steps=4, runtime=Runtime({**CPU, "precision": "bf16-mixed"}))[2]
    assert all(map(math.isfinite, learned.validations.values()))


def test_padding_does_not_count(windows):
    """What stands in the padding changes nothing."""

    def trained(padding):
        rows = [
            {"input_ids": torch.cat([row[:12], torch.full((4,), padding)]), "attention_mask": torch.arange(16) < 12}
            for row in windows
        ]
        return learn(rows, steps=4)[2]

    assert trained(0) == trained(7)


def test_the_loss_is_the_divergence_and_the_weighted_cross_entropy(windows):
    _, _, gates = gated(make_llama(), windows, cross_entropy=0.5)
    logits, dense = torch.randn(2, 2, 4, 96, generator=torch.Generator().manual_seed(0))
    tokens, attended = windows[:2, :4], torch.ones(2, 4, dtype=torch.bool)
    expected = divergence(logits, dense, attended) + 0.5 * next_token_loss(logits, tokens, attended)
    torch.testing.assert_close(gates.loss(logits, dense, tokens, attended), expected)
    _, _, gates = gated(make_llama(), windows)
    torch.testing.assert_close(gates.loss(logits, dense, tokens, attended), divergence(logits, dense, attended))


def test_a_loss_that_is_not_finite_names_the_step(windows, monkeypatch):
    gates = type(gated(make_llama(), windows)[2])
    monkeypatch.setattr(gates, "loss", lambda self, logits, *rest: logits.sum() * math.nan)
    with pytest.raises(RunError, match="the search's loss is not finite at step 0"):
        learn(windows)


def test_gates_that_are_not_finite_name_the_step(windows, monkeypatch):
    """The loss stays finite: a gate is open or closed, whatever its value is."""
    gates = type(gated(make_llama(), windows)[2])
    loss = gates.loss

    def without_gradient(self, *args):
        self.values.register_hook(lambda gradient: gradient * math.nan)
        return loss(self, *args)

    monkeypatch.setattr(gates, "loss", without_gradient)
    with pytest.raises(RunError, match="the search's gates are not finite at step 1; lower its lr"):
        learn(windows)


def test_the_largest_learning_rate(windows):
    """It moves a gate past all others in a step: still a plan within the budget, no worse than the start."""
    sites, budget, learned = learn(windows, lr=10)
    assert 0 <= budget.params - learned.plan.removed_params(sites) < max(site.params_per_unit for site in sites)
    assert learned.validations[learned.best_step] <= learned.validations[0]


@pytest.mark.parametrize("lr", [0, 1e30, math.inf, math.nan])
def test_a_learning_rate_that_makes_no_sense(lr):
    with pytest.raises(InputError, match="lr"):
        searcher(lr=lr)


def test_too_few_windows(windows):
    with pytest.raises(CalibrationError, match="use at least 4 windows"):
        learn(windows[:3])


def test_a_budget_that_cannot_be_met(windows):
    with pytest.raises(InputError, match="largest ratio"):
        flapkit.prune_(make_llama(), windows, ratio=0.99, searcher={"name": "gates", **SHORT})


def test_prunes_by_the_api(windows):
    model, chosen = make_llama(), {"name": "gates", **SHORT, "stand_in": "mean"}
    flapkit.prune_(model, windows, ratio=0.4, searcher=chosen)
    assert model(windows[:1]).logits.isfinite().all()


def test_without_a_training_it_is_the_start():
    sites = flapkit.sites(make_llama())
    scores, budget = random_scores(sites), Budget.over(sites, 0.4)
    chosen = searcher()
    assert find_plan(sites, scores, chosen, budget) == chosen.search(sites, scores, budget)


def test_a_model_on_several_devices_is_refused(windows, monkeypatch):
    monkeypatch.setattr(api, "check_in_memory", lambda model: None)
    model = make_llama()
    model.lm_head.to("meta")
    with pytest.raises(ModelError, match="one device"):
        flapkit.prune_(model, windows, ratio=0.4, searcher={"name": "gates"})


def test_a_recipe(command, recipe, home):
    """The loss is in the result; layer by layer there is one line, before the start."""
    changes = {"searcher": {"name": "gates", **SHORT}, "compensator": "least_squares"}
    code, _, error = command("run", recipe, *(f"--set={k}={json.dumps(v)}" for k, v in changes.items()))
    assert not code, error
    search = json.loads((home / "out" / "result.json").read_text())["search"]
    assert list(search["validation_loss"]) == ["0", "4", "8"]
    assert list(search["training_loss"]) == [str(step) for step in range(1, 9)]
    code, _, error = command("run", recipe, "--set=searcher=gates", "--set=execution=layerwise", "--overwrite")
    assert code
    assert "searcher 'gates' trains gates on the whole model; choose another" in error
