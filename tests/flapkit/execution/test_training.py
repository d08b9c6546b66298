"""Training a pruned model: what falls, what is kept, what stops it, and going on after a kill."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import make_llama
from lightning.pytorch import Callback, Trainer

import flapkit
from flapkit.execution import training as stage
from flapkit.execution.lightning.callbacks import Calibrate, Recover
from flapkit.execution.lightning.data import PruningData, RecoveryData
from flapkit.execution.lightning.module import CausalLM, Optimization
from flapkit.execution.lightning.prune import Prune
from flapkit.execution.lightning.trainer import build_trainer
from flapkit.execution.runtime import Runtime
from flapkit.execution.training import RecoveryText, Workplace, recover_, take_windows
from flapkit.model.budget import Budget
from flapkit.pruning.algorithm import Method
from flapkit.pruning.recovery import Recovery
from flapkit.registry import COMPENSATOR, METRIC, SEARCHER, Registry
from flapkit.system.errors import DataError, RunError

CPU = {"accelerator": "cpu", "devices": 1}


def learnable(count, length=16, seed=0):
    """Draw windows that count upwards, so that there is something to learn."""
    start = torch.randint(0, 96, (count, 1), generator=torch.Generator().manual_seed(seed))
    return (start + torch.arange(length)) % 96


def lora(**options) -> Recovery:
    defaults = {"rank": 4, "steps": 12, "validate_every": 4, "lr": 1e-2, "batch_size": 4, "length": 16}
    return Registry.load().create(COMPENSATOR, "lora", {**defaults, **options}).recovery()


def pruned(tokens, **options):
    model = make_llama(**options)
    flapkit.prune_(model, tokens, ratio=0.4)
    return model


def text(recovery, accumulate=1):
    training = recovery.training
    return RecoveryText(learnable(training.steps * training.batch_size * accumulate), learnable(8, seed=1))


def train(model, recovery, *, options=None, backwards=False, **more):
    runtime = Runtime({**CPU, **(options or {})})
    windows = text(recovery, runtime.options.get("accumulate_grad_batches", 1))
    if backwards:
        windows = RecoveryText(windows.windows.flip(1), windows.validation)
    return recover_(model, flapkit.sites(model), recovery, windows, runtime, **more)


def test_the_loss_falls_and_only_the_pruned_linears_move(tokens):
    model = pruned(tokens)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    recovered = train(model, lora())
    assert list(recovered.validations) == [0, 4, 8, 12]
    assert recovered.validations[12] < recovered.validations[0] - 0.1
    assert recovered.best_step == 12
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    linears = {name for name in before if "proj.weight" in name}
    assert moved == linears
    assert not model.training
    loss = torch.stack([model(row[None], labels=row[None]).loss for row in learnable(8, seed=1)]).mean()
    assert math.isclose(float(loss.detach()), recovered.validations[12], rel_tol=1e-4)


def test_the_optimizer_holds_what_is_trained(tokens):
    """Put in later than in ``setup``, it would silently never be trained."""
    model, recovery = pruned(tokens), lora(merge=False)
    recover = Recover(recovery, flapkit.sites(model))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=2, callbacks=[recover], enable_model_summary=False, **CPU, **options)
    data = RecoveryData(learnable(8), learnable(4), batch_size=4, per_epoch=8)
    trainer.fit(CausalLM(model, Optimization(lr=1e-2)), data)
    held = {id(parameter) for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
    updates = {id(parameter) for name, parameter in model.named_parameters() if "lora_" in name}
    assert held == updates


def test_trains_what_a_trainer_pruned(tokens):
    """Parameters made in ``predict`` under inference mode could not be trained."""
    model, registry = make_llama(), Registry.load()
    sites = flapkit.sites(model)
    components = registry.create(METRIC, "wifv"), registry.create(SEARCHER, "al_am")
    method = Method(*components, (registry.create(COMPENSATOR, "bias"),))
    calibrate = Calibrate(sites, method.statistics)
    prune = Prune(calibrate, sites, method, Budget.over(sites, 0.4))
    build_trainer([calibrate, prune], **CPU).predict(CausalLM(model), PruningData(tokens), return_predictions=False)
    recovered = train(model, lora())
    assert recovered.validations[12] < recovered.validations[0]


@dataclass
class Kill(Callback):
    """Stop a training as a kill would, after some step."""

    step: int

    def on_train_batch_end(self, trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise SystemError("killed")


@pytest.mark.parametrize("killed_at", [2, 4, 9])
def test_a_resumed_training_is_as_one_that_was_not_stopped(tokens, tmp_path, monkeypatch, killed_at):
    recovery, accumulate = lora(dropout=0.2, steps=11), {"accumulate_grad_batches": 2}
    whole = pruned(tokens)
    expected = train(whole, recovery, options=accumulate)
    workplace = Workplace(tmp_path, {"training": "this training"})
    with monkeypatch.context() as patched:
        watching = stage.recovery_callbacks
        patched.setattr(stage, "recovery_callbacks", lambda *a, **k: [Kill(killed_at), *watching(*a, **k)])
        with pytest.raises(SystemError):
            train(pruned(tokens), recovery, options=accumulate, workplace=workplace)
    assert workplace.checkpoint.is_file() == (killed_at > 4)
    torch.rand(3)
    resumed = pruned(tokens)
    found = train(resumed, recovery, options=accumulate, workplace=workplace)
    assert found.validations == expected.validations
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_finished_training_is_not_done_again(tokens, tmp_path):
    workplace, recovery = Workplace(tmp_path, {"training": "this training"}), lora()
    first, again = pruned(tokens), pruned(tokens)
    expected = train(first, recovery, workplace=workplace)
    assert train(again, recovery, workplace=workplace).validations == expected.validations
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_holds_what_is_trained_alone_and_of_another_training_it_is_left(tokens, tmp_path):
    train(pruned(tokens), lora(), workplace=Workplace(tmp_path, {"training": "one training"}))
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in name for name in held)
    other = train(pruned(tokens), lora(steps=4), workplace=Workplace(tmp_path, {"training": "another training"}))
    assert max(other.validations) == 4


def test_loggers(tokens, tmp_path):
    pytest.importorskip("tensorboard")
    train(pruned(tokens), lora(), workplace=Workplace(tmp_path, {}, ("csv", "tensorboard")))
    lines = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert set(lines[0].split(",")) >= {"step", "train/loss", "validation/loss", "validation/perplexity", "lr-AdamW"}
    assert len(lines) > 12
    assert list((tmp_path / "logs" / "version_0").glob("events.out.tfevents*"))


def test_the_best_is_kept(tokens, caplog):
    """Trained on the contrary of what validates nothing gets better, and the pruned model stays as it was."""
    model = pruned(tokens)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with caplog.at_level(logging.WARNING):
        recovered = train(model, lora(), backwards=True)
    assert recovered.best_step == 0
    assert "no step was better than the pruned model" in caplog.text
    for one, other in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_stops_early(tokens):
    recovered = train(pruned(tokens), lora(steps=40, patience=2), backwards=True)
    assert list(recovered.validations) == [0, 4, 8, 12]


def test_a_loss_that_is_not_finite(tokens):
    model, recovery = pruned(tokens), lora()
    attach = recovery.attach

    def spoilt(model, sites):
        trainable = attach(model, sites)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(torch.nan)
        return trainable

    with pytest.raises(RunError, match="the recovery's loss is not finite at step 0; lower its lr"):
        train(model, Recovery(recovery.training, spoilt))


def test_a_training_that_diverges(tokens):
    with pytest.raises(RunError, match=r"not finite at step \d"):
        train(pruned(tokens), lora(lr=1e30, warmup=0.0), options={"gradient_clip_val": None})


def test_the_dense_model_teaches(tokens):
    """On random text only the teacher can be learned from: the pruned model comes nearer to it."""
    dense, recovery = make_llama(), lora(distill=True, steps=40, validate_every=20, lr=3e-3)
    noise = torch.randint(0, 96, (160, 16), generator=torch.Generator().manual_seed(3))

    def distance(model):
        with torch.no_grad():
            ours, theirs = (each(noise[:16]).logits.log_softmax(-1) for each in (model, dense))
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    found = {}
    for teacher in (None, dense):
        model = pruned(tokens)
        recover_(model, flapkit.sites(model), recovery, RecoveryText(noise, noise[:8]), Runtime(CPU), teacher=teacher)
        found[teacher is None] = distance(model)
    assert found[False] < found[True]
    assert found[False] < distance(pruned(tokens))


def test_float16_weights_are_trained_in_mixed_precision(tokens, caplog):
    model = pruned(tokens).half()
    with caplog.at_level(logging.INFO, "flapkit"):
        recovered = train(model, lora())
    assert "training in bf16-mixed" in caplog.text
    assert recovered.validations[12] < recovered.validations[0]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}


def test_given_windows():
    training = lora(steps=10).training
    windows = torch.arange(20).view(20, 1).expand(20, 5).contiguous()
    taken = take_windows(training, windows)
    assert taken.windows.shape == (40, 5)
    assert taken.validation[:, 0].tolist() == [9, 19]
    counts = torch.bincount(taken.windows[:, 0], minlength=20)
    assert counts[[9, 19]].sum() == 0
    assert set(counts.tolist()) == {0, 2, 3}


@pytest.mark.parametrize("tokens", [torch.zeros(9, 4).long(), torch.zeros(40).long(), torch.zeros(40, 4)])
def test_windows_that_are_none(tokens):
    with pytest.raises(DataError, match="recovery text: expected tokens as a LongTensor"):
        take_windows(lora().training, tokens)
