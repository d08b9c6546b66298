"""A training that FlapPruning began goes on from Lightning's checkpoints, and is loaded from them."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import make_llama
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

import flapkit
from flapkit.execution.lightning.data import WindowRows, collate
from flapkit.execution.lightning.module import CausalLM
from flapkit.execution.lightning.restore import KEY, restore_pruning_
from flapkit.model.history import plan_of
from flapkit.system.errors import FlapkitError, ModelError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
SILENT = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
FORMS = {"bias": {}, "query heads": {"adapter": {"name": "llama", "unit": "query_head"}}, "biases": {"of": "mlp"}}


class Mine(LightningModule):
    """A module of somebody's own, which lets load_from_checkpoint know."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        return self.model(**batch, labels=batch["input_ids"]).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def on_load_checkpoint(self, checkpoint):
        flapkit.restore_pruning_(self.model, checkpoint)


class Plain(Mine):
    """A module that knows nothing of pruning."""

    def on_load_checkpoint(self, checkpoint):
        """Do nothing."""


def grouped():
    return make_llama(num_attention_heads=8, num_key_value_heads=4, hidden_size=32).train()


def fit(module, tokens, folder, epochs, ckpt_path=None, calibration=None, **options):
    pruning = flapkit.FlapPruning(tokens if calibration is None else calibration, ratio=0.4, **options)
    trainer = Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=[pruning], **SILENT)
    loader = DataLoader(WindowRows({"input_ids": tokens}), batch_size=8, collate_fn=collate)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return pruning, trainer.checkpoint_callback.best_model_path


@pytest.mark.parametrize("module", [Plain, Mine, CausalLM])
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_a_training_goes_on_as_if_it_had_not_stopped(tokens, tmp_path, module, options):
    """Also where another calibration text would give another plan."""
    straight, stopped, resumed = module(grouped()), module(grouped()), module(grouped())
    expected, _ = fit(straight, tokens, tmp_path / "straight", 2, **options)
    first, checkpoint = fit(stopped, tokens, tmp_path / "stopped", 1, **options)
    again, _ = fit(resumed, tokens, tmp_path / "stopped", 2, checkpoint, calibration=tokens.flip(1)[:4], **options)
    assert again.plan == first.plan == expected.plan
    assert plan_of(resumed.model) == plan_of(straight.model)
    assert resumed.model.config.to_dict() == straight.model.config.to_dict()
    if module is not CausalLM:  # its learning rate depends on the number of steps
        for name, tensor in straight.model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], tensor)
    flapkit.save(resumed.model.eval(), tmp_path / "pruned")
    probe = tokens[:2]
    torch.testing.assert_close(flapkit.load(tmp_path / "pruned")(probe).logits, resumed.model(probe).logits)


@pytest.mark.parametrize("module", [Mine, CausalLM])
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_load_from_checkpoint(tokens, tmp_path, module, options):
    trained = module(grouped())
    _, checkpoint = fit(trained, tokens, tmp_path, 1, **options)
    loaded = module.load_from_checkpoint(checkpoint, model=grouped())
    assert plan_of(loaded.model) == plan_of(trained.model)
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    probe = tokens[:2]
    assert torch.equal(loaded.model.eval()(probe).logits, trained.model.eval()(probe).logits)
    again = module.load_from_checkpoint(checkpoint, model=loaded.model)
    assert torch.equal(again.model.eval()(probe).logits, trained.model(probe).logits)


def test_a_model_that_was_pruned_before(tokens, tmp_path):
    base = [grouped(), grouped()]
    for model in base:
        flapkit.prune_(model, tokens, ratio=0.2)
    trained = Mine(base[0])
    _, checkpoint = fit(trained, tokens, tmp_path, 1)
    loaded = Mine.load_from_checkpoint(checkpoint, model=base[1])
    assert plan_of(loaded.model) == plan_of(trained.model)
    assert all(map(torch.equal, loaded.model.parameters(), trained.model.parameters()))


def test_a_checkpoint_of_another_model_is_refused(tokens, tmp_path):
    _, checkpoint = fit(Mine(grouped()), tokens, tmp_path, 1)
    state = torch.load(checkpoint)
    assert json.loads(state["callbacks"][KEY]["plan"])["keep"]
    for other in (make_llama(num_hidden_layers=3), make_llama(intermediate_size=8)):
        with pytest.raises(FlapkitError, match=r"layers|smaller"):
            restore_pruning_(other, state)
    del state["callbacks"]
    with pytest.raises(ModelError, match="contains no plan: the model was trained without FlapPruning"):
        restore_pruning_(grouped(), state)
