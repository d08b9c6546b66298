"""Least squares: what it promises, site by site and for whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_llama
from flapkit_compensators.bias import Bias
from flapkit_compensators.least_squares import LeastSquares
from flapkit_compensators.none import NoCompensation
from planted import measured, site_of

import flapkit
from flapkit.checkpoint.load import load_tokenizer
from flapkit.model.plan import PruningPlan
from flapkit.model.surgery import apply_plan_
from flapkit.pruning.algorithm import find_corrections
from flapkit.pruning.collector import measure
from flapkit.pruning.components import needed_statistics
from flapkit.pruning.gram import Gram, HeldOutGram
from flapkit.pruning.trials import perplexity_of, running
from flapkit.system.errors import CalibrationError
from flapkit.text.stdlib import stdlib_documents
from flapkit.text.windows import encode

KEEP = (0, 2, 3)


@pytest.fixture
def x() -> torch.Tensor:
    """Inputs [400, 6] whose channels say much of each other."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(400, 3, generator=draw) @ torch.randn(3, 6, generator=draw)
    return common + 0.3 * torch.randn(400, 6, generator=draw) + 2


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def error(x, weight, correction, keep=KEEP) -> float:
    """Return the mean square error of a repaired consumer."""
    kept = list(keep)
    new = weight[:, kept] if correction.weight is None else correction.weight
    repaired = x[:, kept].double() @ new.T.double()
    if correction.bias is not None:
        repaired = repaired + correction.bias
    return float((x.double() @ weight.T.double() - repaired).square().sum(dim=1).mean())


def correct(compensator, x, weight, held_out=range(300, 400), keep=KEEP):
    stats = measured(x, compensator, held_out=list(held_out))
    return compensator.correct(site_of(x.shape[1], 1), stats, weight, keep)


@pytest.mark.parametrize("ridge", ["auto", 0.0, 1e-3, 1.0, 100.0])
def test_never_worse_than_bias_on_the_calibration_text(x, weight, ridge):
    bias = error(x, weight, correct(Bias(), x, weight))
    assert error(x, weight, correct(LeastSquares(ridge=ridge), x, weight)) <= bias * (1 + 1e-6)


@pytest.mark.parametrize("ridge", ["auto", 0.0, 1e-3, 1.0, 100.0])
def test_without_intercept_never_worse_than_nothing(x, weight, ridge):
    nothing = error(x, weight, correct(NoCompensation(), x, weight))
    correction = correct(LeastSquares(intercept=False, ridge=ridge), x, weight)
    assert correction.bias is None
    assert error(x, weight, correction) <= nothing * (1 + 1e-6)


def test_it_is_torchs_own_least_squares(x, weight):
    kept = x[:, list(KEEP)].double()
    removed = torch.ones(6, dtype=torch.float64)
    removed[list(KEEP)] = 0
    target = (x.double() * removed) @ weight.T.double()
    for intercept in (True, False):
        design = torch.cat([kept, torch.ones(len(x), intercept)], dim=1)
        expected = torch.linalg.lstsq(design, target).solution.T
        found = correct(LeastSquares(intercept=intercept, ridge=0.0), x, weight)
        torch.testing.assert_close(found.weight - weight[:, list(KEEP)], expected[:, :3], rtol=1e-5, atol=1e-6)
        if intercept:
            torch.testing.assert_close(found.bias, expected[:, 3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("ridge", ["auto", 0.0])
def test_a_gram_of_low_rank(x, weight, intercept, ridge):
    x[:, 3] = x[:, 2]
    x[:, 0] = 0
    correction = correct(LeastSquares(intercept=intercept, ridge=ridge), x, weight)
    assert torch.isfinite(correction.weight).all()
    floor = Bias() if intercept else NoCompensation()
    assert error(x, weight, correction) < error(x, weight, correct(floor, x, weight))


def test_dead_inputs(weight):
    correction = correct(LeastSquares(ridge=0.0), torch.zeros(40, 6), weight, held_out=())
    torch.testing.assert_close(correction.weight, weight[:, list(KEEP)].double())
    assert not correction.bias.any()


def test_in_float32_as_in_float64(x, weight, monkeypatch):
    exact = correct(LeastSquares(), x, weight)
    monkeypatch.setattr(Gram, "widest_in_float64", 5)
    coarse = correct(LeastSquares(), x, weight)
    assert coarse.weight.dtype == torch.float32
    torch.testing.assert_close(coarse.weight.double(), exact.weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("intercept", "instead"), [(True, Bias()), (False, NoCompensation())])
def test_the_guard(weight, intercept, instead):
    """Channels that go together on three quarters of the text, and against each other on the rest."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(400, 6, generator=draw)
    x[:, 1] = x[:, 0]
    x[300:, 1] *= -1
    x[:, 4:] = 0
    correction = correct(LeastSquares(intercept=intercept), x, weight)
    assert correction.weight is None
    assert correction.note is not None
    assert ("bias" if intercept else "no repair") in correction.note
    expected = correct(instead, x, weight).bias
    if expected is None:
        assert correction.bias is None
    else:
        torch.testing.assert_close(correction.bias, expected)


def test_too_few_windows_to_judge(x, weight):
    with pytest.raises(CalibrationError, match="at least four windows, or a ridge"):
        correct(LeastSquares(), x, weight, held_out=())
    model, tokens = make_llama(), torch.randint(0, 96, (3, 16))
    with pytest.raises(CalibrationError, match="at least four windows"):
        flapkit.prune_(model, tokens, compensator="least_squares")
    flapkit.prune_(model, tokens, compensator=LeastSquares(ridge=0.1))


def test_a_given_ridge_needs_no_held_out_text():
    assert HeldOutGram not in needed_statistics([LeastSquares(ridge=0.1)])
    assert HeldOutGram in needed_statistics([LeastSquares()])


@torch.no_grad()
@pytest.mark.parametrize("intercept", [True, False])
def test_what_the_kept_channels_say_costs_nothing(llama, tokens, probe, intercept):
    """Removed MLP channels that are combinations of kept ones: the logits do not change, on any text."""
    sites = [site for site in flapkit.sites(llama) if site.kind == "mlp"]
    for layer in llama.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight[:4] = projection.weight[4:8]
            if projection.bias is not None:
                projection.bias[:4] = projection.bias[4:8]
        # silu(g) u is linear in u: half of a channel, and the sum of two channels of one gate.
        layer.mlp.up_proj.weight[2] *= 0.5
        if layer.mlp.up_proj.bias is not None:
            layer.mlp.up_proj.bias[2] *= 0.5
    expected = llama(probe).logits
    compensator = LeastSquares(intercept=intercept, ridge=0.0)
    statistics = measure(llama, sites, compensator.measures(), [{"input_ids": tokens}])
    plan = PruningPlan({site.name: tuple(range(4, site.units)) for site in sites})
    apply_plan_(llama, sites, plan, find_corrections(llama, sites, statistics, [compensator], plan))
    torch.testing.assert_close(llama(probe).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_closer_to_the_dense_model_than_bias(tokens):
    """On the calibration text itself, for a random model."""
    dense = make_llama()(tokens).logits
    distance = {}
    for name in ("none", "bias", "least_squares"):
        model = make_llama()
        flapkit.prune_(model, tokens, compensator=name, ratio=0.3)
        distance[name] = float((model(tokens).logits - dense).square().mean())
    assert distance["least_squares"] < distance["bias"] < distance["none"]


@pytest.fixture(scope="module")
def code():
    """The bundled model, 8 windows of code to calibrate on, and 32 windows of other modules."""
    model, tokenizer = flapkit.load("builtin:tiny-llama", "float32"), load_tokenizer("builtin:tiny-llama")
    seen, unseen = (encode(tokenizer, stdlib_documents(split)[::20], "\n\n") for split in ("train", "heldout"))
    starts = torch.arange(8) * (len(seen) // 8)
    return model, torch.stack([seen[start : start + 128] for start in starts]), unseen[: 32 * 128].view(32, 128)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
def test_eight_windows_are_no_worse_than_bias_on_other_text(code, ratio):
    dense, calibration, other = code
    found = {}
    for name in ("bias", "least_squares"):
        model = copy.deepcopy(dense)
        flapkit.prune_(model, calibration, compensator=name, ratio=ratio)
        text = [{"input_ids": other}]
        found[name] = perplexity_of(running(model, text), text)
    assert found["least_squares"] <= found["bias"]
