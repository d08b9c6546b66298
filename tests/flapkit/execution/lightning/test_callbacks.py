"""Pruning in a Lightning script of one's own, and what Lightning 2.6 gets wrong if it is not told."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import flapkit
from flapkit.execution.lightning.callbacks import Calibrate, Evaluate
from flapkit.execution.lightning.data import PruningData, WindowRows, collate
from flapkit.execution.lightning.module import CausalLM, Optimization
from flapkit.execution.lightning.prune import Prune, SaveCheckpoint
from flapkit.execution.lightning.trainer import build_trainer
from flapkit.model.budget import Budget
from flapkit.model.history import plan_of
from flapkit.pruning.algorithm import Method
from flapkit.pruning.collector import measure
from flapkit.pruning.moments import Moments
from flapkit.registry import COMPENSATOR, METRIC, SEARCHER, Registry
from flapkit.system.errors import CalibrationError, RecipeError, RunError
from flapkit.text.windows import cut_windows

SILENT = {"logger": False} | dict.fromkeys(
    ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)


def pruning_callbacks(model):
    registry = Registry.load()
    bias = registry.create(COMPENSATOR, "bias")
    method = Method(registry.create(METRIC, "wifv"), registry.create(SEARCHER, "al_am"), (bias,))
    sites = flapkit.sites(model)
    calibrate = Calibrate(sites, [Moments])
    return calibrate, Prune(calibrate, sites, method, Budget.over(sites, 0.4))


def prune_by_trainer(model, tokens, more=lambda prune: []):
    calibrate, prune = pruning_callbacks(model)
    trainer = build_trainer([calibrate, prune, *more(prune)], accelerator="cpu", devices=1)
    trainer.predict(CausalLM(model), PruningData(tokens), return_predictions=False)
    return prune.pruned.plan


def test_the_trainer_prunes_as_the_function_does(llama, tokens, probe):
    other = make_llama(**{k: v for k, v in llama.config.to_dict().items() if k != "dtype"})
    other.load_state_dict(llama.state_dict())
    assert prune_by_trainer(llama, tokens) == flapkit.prune_(other, tokens, ratio=0.4)
    assert torch.equal(llama(probe).logits, other(probe).logits)


def test_saves_what_it_pruned(tokens, probe, tmp_path):
    model = make_llama()
    plan = prune_by_trainer(model, tokens, lambda prune: [SaveCheckpoint(prune, tmp_path / "saved")])
    assert (tmp_path / "saved" / "plan.json").read_text() == plan.to_json()
    assert torch.equal(flapkit.load(tmp_path / "saved")(probe).logits, model(probe).logits)


def test_a_pruned_model_that_transformers_loaded_is_pruned_on(pruned_folder, tokens, tmp_path):
    one, other = (AutoModelForCausalLM.from_pretrained(pruned_folder) for _ in range(2))
    prune_by_trainer(one, tokens, lambda prune: [SaveCheckpoint(prune, tmp_path / "again")])
    flapkit.prune_(other, tokens, ratio=0.4)
    assert plan_of(flapkit.load(tmp_path / "again")) == plan_of(one) == plan_of(other)


def test_saves_nothing_that_is_not_pruned(tokens, tmp_path):
    model = make_llama()
    with pytest.raises(RunError, match="put Prune before it"):
        prune_by_trainer(model, tokens, lambda prune: [SaveCheckpoint(Prune(None, [], None, None), tmp_path / "saved")])
    assert not (tmp_path / "saved").exists()


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
def test_a_plain_trainer_prunes_trains_and_saves(tokens, probe, tmp_path):
    """Lightning predicts under inference mode; what was made under it could not be trained."""
    model = make_llama()
    calibrate, prune = pruning_callbacks(model)
    callbacks = [calibrate, prune, SaveCheckpoint(prune, tmp_path / "saved", after="fit")]
    trainer = Trainer(max_steps=1, accelerator="cpu", devices=1, callbacks=callbacks, **SILENT)
    module = CausalLM(model, Optimization(lr=1e-2, warmup=0.0))
    trainer.predict(module, PruningData(tokens), return_predictions=False)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    assert not any(part.is_inference() for of in calibrate.statistics.values() for part in of[Moments].state.values())
    pruned = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.fit(module.train(), DataLoader(WindowRows({"input_ids": tokens}), batch_size=8, collate_fn=collate))
    assert not any(torch.equal(parameter, pruned[name]) for name, parameter in model.named_parameters())
    assert torch.equal(flapkit.load(tmp_path / "saved")(probe).logits, model.eval()(probe).logits)


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
def test_flap_pruning_before_training(tokens):
    """The optimizer holds the new weights: all of them move."""
    model = make_llama().train()
    pruning = flapkit.FlapPruning(tokens, ratio=0.4)
    trainer = Trainer(max_steps=4, accelerator="cpu", callbacks=[pruning], **SILENT)
    initial = make_llama().num_parameters()
    loader = DataLoader(WindowRows({"input_ids": tokens}), batch_size=8, collate_fn=collate)
    trainer.fit(CausalLM(model, Optimization(lr=1e-2, warmup=0.0)), loader)
    assert pruning.plan is not None
    assert model.num_parameters() < initial
    trained = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in model.parameters()}


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
def test_float16_weights_are_not_trained_into_nan(tokens):
    pruning = flapkit.FlapPruning(tokens[:2], ratio=0.4)
    trainer = Trainer(max_steps=1, accelerator="cpu", devices=1, callbacks=[pruning], **SILENT)
    loader = DataLoader(WindowRows({"input_ids": tokens[:2]}), batch_size=2, collate_fn=collate)
    with pytest.raises(RunError, match=r"float16, in which the eps of AdamW, 1e-08, is 0.*model\.float\(\)"):
        trainer.fit(CausalLM(make_llama().half()).train(), loader)


def test_no_hook_is_left(tokens):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = torch.nan
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.down_proj"):
        prune_by_trainer(model, tokens)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_token_is_too_few(tokens):
    with pytest.raises(CalibrationError, match="needs two tokens"):
        flapkit.prune_(make_llama(), tokens[:1, :1])


def test_evaluates_by_the_protocol(tokens):
    model = make_llama()
    data = PruningData(evaluations={"text": cut_windows(tokens.flatten(), 16)})
    evaluate = Evaluate(data.evaluation_names)
    build_trainer([evaluate], accelerator="cpu", devices=1).test(CausalLM(model), data, verbose=False)
    with torch.no_grad():
        mean = torch.stack([model(row[None], labels=row[None]).loss for row in tokens]).mean()
    torch.testing.assert_close(evaluate.results["text"].over_windows.float(), mean.exp(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "test_step of Mine must return a mapping with `nll` and `targets`.* it returned None"),
        (torch.ones(1), "it returned a Tensor"),
        ({"loss": torch.ones(1)}, "it returned a mapping with loss"),
    ],
)
def test_a_test_step_that_does_not_measure(tokens, returned, message):
    class Mine(CausalLM):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            return returned

    data = PruningData(evaluations={"text": cut_windows(tokens.flatten(), 16)})
    trainer = build_trainer([Evaluate(data.evaluation_names)], accelerator="cpu", devices=1)
    with pytest.raises(RunError, match=message):
        trainer.test(Mine(make_llama()), data, verbose=False)


def test_a_device_that_is_not_here():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(RecipeError, match="trainer"):
        build_trainer([], accelerator="cuda", devices=1)


def test_gradients_under_the_trainer(tokens):
    """``predict`` runs without gradients; the backward pass of calibration is the same there as by itself."""
    model = make_llama()
    metric = Registry.load().create(METRIC, "taylor")
    sites = flapkit.sites(model)
    calibrate = Calibrate(sites, metric.statistics)
    module = CausalLM(model, calibrate_gradient=True)
    build_trainer([calibrate], accelerator="cpu", devices=1).predict(
        module, PruningData(tokens, batch_size=5), return_predictions=False
    )
    expected = measure(model, sites, metric.statistics, [{"input_ids": tokens}])
    for site in sites:
        ours, theirs = (found[site.name][metric.statistics[0]] for found in (calibrate.statistics, expected))
        torch.testing.assert_close(ours.products, theirs.products, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
def test_flap_pruning_by_gradients(tokens):
    expected = flapkit.prune_(make_llama(), tokens, "taylor", ratio=0.4)
    model, pruning = make_llama().train(), flapkit.FlapPruning(tokens, ratio=0.4, metric="taylor")
    trainer = Trainer(max_steps=1, accelerator="cpu", callbacks=[pruning], **SILENT)
    loader = DataLoader(WindowRows({"input_ids": tokens}), batch_size=8, collate_fn=collate)
    trainer.fit(CausalLM(model), loader)
    assert pruning.plan == expected
