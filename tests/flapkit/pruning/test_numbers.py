"""Numbers at their limits: narrow types, outliers, what is not finite, what never changes, quantised models."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_llama, write_recipe
from safetensors.torch import load_file, save_file
from torch import nn

import flapkit
from flapkit.checkpoint.bundled import bundled_models
from flapkit.model.plan import PruningPlan
from flapkit.pruning.algorithm import find_corrections
from flapkit.pruning.collector import measure, run_batch
from flapkit.pruning.components import Compensator
from flapkit.pruning.gram import Gram
from flapkit.pruning.moments import Moments
from flapkit.pruning.ranking import standardise
from flapkit.registry import COMPENSATOR, METRIC, Registry
from flapkit.system.errors import CalibrationError, DataError, ModelError

NARROW = (torch.bfloat16, torch.float16)


def shared(one: PruningPlan, other: PruningPlan) -> float:
    """Return the share of one plan's units that the other keeps too."""
    common = sum(len(set(units) & set(other.keep[name])) for name, units in one.keep.items())
    return common / sum(map(len, one.keep.values()))


@pytest.mark.parametrize("dtype", NARROW)
@torch.no_grad()
def test_a_narrow_model_is_pruned_like_a_wide_one(dtype, tokens, probe):
    models = {each: flapkit.load("builtin:tiny-llama", each) for each in (torch.float32, dtype)}
    plans = {each: flapkit.prune_(model, tokens, ratio=0.3) for each, model in models.items()}
    assert shared(plans[torch.float32], plans[dtype]) > 0.95
    narrow = models[dtype]
    assert {parameter.dtype for parameter in narrow.parameters()} == {dtype}
    assert torch.isfinite(narrow(probe).logits).all()


@pytest.mark.parametrize("dtype", NARROW)
def test_statistics_of_a_narrow_model_are_float64(dtype, tokens):
    model = make_llama().to(dtype)
    measured = measure(model, flapkit.sites(model), [Moments, Gram], [{"input_ids": tokens}])
    for stats in measured.values():
        for statistic in (Moments, Gram):
            states = list(stats[statistic].state.values())
            assert {state.dtype for state in states} == {torch.float64}


@pytest.mark.parametrize("name", ["bias", "least_squares"])
def test_corrections_of_a_narrow_model_are_wide_until_they_are_written(name, tokens, monkeypatch):
    model = make_llama().to(torch.bfloat16)
    component: Compensator = Registry.load().create(COMPENSATOR, name)
    seen = []

    def correct(self, *arguments):
        seen.append(original(self, *arguments))
        return seen[-1]

    original = type(component).correct
    monkeypatch.setattr(type(component), "correct", correct)
    sites, statistics = flapkit.sites(model), component.measures()
    measured = measure(model, sites, statistics, [{"input_ids": tokens, "held_out": torch.arange(24) % 4 == 3}])
    plan = PruningPlan({site.name: tuple(range(site.units // 2)) for site in sites})
    find_corrections(model, sites, measured, [component], plan)
    assert len(seen) == len(sites)
    for correction in seen:
        tensors = [tensor for tensor in (correction.weight, correction.bias) if tensor is not None]
        assert {tensor.dtype for tensor in tensors} <= {torch.float32, torch.float64}


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_variances_beside_outliers_are_exact(dtype):
    """Massive activations, as of LLaMA's first token: a few channels and tokens of 1e4 among small ones."""
    torch.manual_seed(0)
    x = torch.randn(4096, 16)
    x[::512, 3] = 1e4
    x[:, 5] += 1e4
    x = x.to(dtype)
    moments, gram = Moments(16), Gram(16)
    for part in x.split(37):
        moments.update(part)
        gram.update(part)
    exact = x.double() - x.double().mean(dim=0)
    torch.testing.assert_close(moments.variance, exact.square().sum(dim=0) / 4095, rtol=1e-9, atol=0)
    covariance, deviations = exact.T @ exact / 4096, exact.square().mean(dim=0).sqrt()
    assert ((gram.covariance[0] - covariance).abs() <= 1e-6 * torch.outer(deviations, deviations)).all()


def overflowing() -> nn.Module:
    model = make_llama()
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            model.model.layers[1].mlp.get_submodule(name).weight.mul_(2000)
    return model


def test_an_overflow_in_float16_is_named(tokens):
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.down_proj: its input is not finite.*bfloat16"):
        flapkit.prune_(overflowing().to(torch.float16), tokens)
    flapkit.prune_(overflowing().to(torch.bfloat16), tokens)


def test_what_is_not_finite_ends_calibration_at_the_first_batch(tokens):
    model, seen = overflowing().to(torch.float16), []
    model.model.register_forward_pre_hook(lambda *_: seen.append(1))

    class Many(torch.utils.data.Dataset):
        def __len__(self):
            return 1000

        def __getitem__(self, index):
            return {"input_ids": tokens[index % 24]}

    with pytest.raises(CalibrationError, match="not finite"):
        flapkit.prune_(model, Many(), options=flapkit.PruneOptions(batch_size=4))
    assert len(seen) <= 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, tokens, name, value):
    model = make_llama()
    model.get_parameter(name).data.view(-1)[3] = value
    with pytest.raises(ModelError, match=rf"{name}: 1 of .* values are NaN or infinite"):
        flapkit.prune_(model, tokens)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=rf"model .*model: {name}: 1 of"):
        flapkit.load(tmp_path / "model")


def constant_mlp() -> nn.Module:
    """A LLaMA whose first MLP's hidden channels are its biases, whatever it reads."""
    model = make_llama(mlp_bias=True)
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            model.model.layers[0].mlp.get_submodule(name).weight.zero_()
    return model


def dead_channels() -> nn.Module:
    model = make_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[::2].zero_()
    return model


@torch.no_grad()
def test_dead_channels_go_first_and_are_not_missed(tokens, probe):
    model = dead_channels()
    before = model(probe).logits
    plan = flapkit.prune_(model, tokens, searcher="per_parameter", of="mlp", ratio=0.2)
    assert set(range(1, 40, 2)) <= set(plan.keep["layers.0.mlp"])
    torch.testing.assert_close(model(probe).logits, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [constant_mlp, dead_channels])
@pytest.mark.parametrize("compensator", ["bias", "least_squares"])
@pytest.mark.parametrize("metric", sorted(Registry.load().names(METRIC)))
@torch.no_grad()
def test_channels_that_never_change_give_no_nan(tokens, probe, make, metric, compensator):
    model = make()
    flapkit.prune_(model, tokens, metric=metric, compensator=compensator)
    assert torch.isfinite(model(probe).logits).all()


def test_a_site_whose_scores_are_equal_is_average_and_said(tokens, caplog):
    with caplog.at_level(logging.WARNING, "flapkit"):
        flapkit.prune_(constant_mlp(), tokens)
    assert "gives all units of a site the same score at layers.0.mlp;" in caplog.text


@pytest.mark.parametrize("count", [2, 3, 7, 40])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e-200, 1e200])
def test_equal_scores_are_zeros_whatever_rounding_does(count, value):
    assert not standardise(torch.full((count,), value, dtype=torch.float64)).any()


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_standardised_scores_have_no_scale(scale):
    scores = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(standardise(scores * scale), standardise(scores))


@pytest.mark.parametrize("metric", ["wifv", "obs", "magnitude"])
def test_one_token_is_not_enough(tokens, metric):
    with pytest.raises(CalibrationError, match="needs two tokens, and 1 was seen"):
        flapkit.prune_(make_llama(), tokens[:1, :1], metric=metric)


def test_windows_without_tokens_are_refused(tokens):
    with pytest.raises(DataError, match="expected tokens"):
        flapkit.prune_(make_llama(), tokens[:, :0])


@torch.no_grad()
def test_two_tokens_are_the_least(tokens, probe):
    model = make_llama()
    flapkit.prune_(model, tokens[:1, :2])
    assert torch.isfinite(model(probe).logits).all()
    with pytest.raises(CalibrationError, match="at least four windows"):
        flapkit.prune_(make_llama(), tokens[:1, :2], compensator="least_squares")


@pytest.fixture
def recipe(home) -> Path:
    shutil.copytree(bundled_models()["tiny-llama"], home / "model")
    return write_recipe(home, model={"path": "model"})


@pytest.mark.parametrize("text", ["", " \n\n\t", "\ufeff"])
def test_an_empty_evaluation_text(command, home, recipe, text):
    (home / "empty.txt").write_text(text)
    code, _, err = command("run", recipe, "--set", "evaluate.perplexity.0.dataset=empty.txt")
    assert (code, "empty.txt: no text" in err) == (2, True), err


QUANTISED = {
    "bitsandbytes, 4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, 8 bits": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "gptq, 4 bits": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq, 4 bits": {"quant_method": "awq", "bits": 4, "zero_point": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "according to its config.json": {"unheard": "of"},
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_checkpoints_are_refused(command, home, recipe, method):
    config = home / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": QUANTISED[method]}))
    message = f"model: its weights are quantised ({method}); use the model in float32"
    for arguments in (("run", recipe), ("check", recipe), ("evaluate", "model", "--recipe", recipe)):
        code, _, err = command(*arguments)
        assert (code, message in err) == (2, True), err
    with pytest.raises(ModelError, match="its weights are quantised"):
        flapkit.load(home / "model")
    assert not (home / "out").exists()


def test_integer_weights_that_no_configuration_tells_of(home, recipe):
    file = home / "model" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} is quantised .stored as I8"):
        flapkit.load(home / "model")


class Packed(nn.Linear):
    """Stands for bitsandbytes' linears: a linear by class, whose weight is packed integers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class Grouped(nn.Module):
    """Stands for GPTQ's and AWQ's linears: no weight, but integers and scales beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


class Eight(nn.Linear):
    """Stands for FP8 linears."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.parametrize("name", ["mlp.down_proj", "self_attn.q_proj"])
@pytest.mark.parametrize("quantised", [Packed, Grouped, Eight])
def test_quantised_modules_in_memory_are_refused(tokens, quantised, name):
    model = make_llama()
    layer = model.model.layers[1]
    layer.set_submodule(name, quantised(layer.get_submodule(name)))
    with pytest.raises(ModelError, match=r"(?s)model\.layers\.1\..*quantised"):
        flapkit.prune_(model, tokens)


def test_a_model_that_says_it_is_quantised(tokens):
    model = make_llama()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: its weights are quantised \(gptq, 4 bits\)"):
        flapkit.prune_(model, tokens)


def test_a_batch_is_run_in_the_model_s_own_type(tokens):
    model = make_llama().to(torch.float16)
    seen = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *args: seen.append(args[1][0].dtype))
    run_batch(model, {"input_ids": tokens})
    handle.remove()
    assert seen == [torch.float16]
