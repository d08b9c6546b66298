"""A pruned model that lives on: trained, adapted, enlarged, saved, loaded without flapkit, and pruned again."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_llama
from datasets import Dataset
from runs import run_without_flapkit
from transformers import Trainer, TrainingArguments

import flapkit
from flapkit.checkpoint.load import load_tokenizer
from flapkit.model.history import plan_of
from flapkit.model.plan import PruningPlan

TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "gradient_checkpointing": True,
    "bf16": True,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
}

WITHOUT_FLAPKIT = """
import sys, torch
sys.modules["flapkit"] = None  # as if it were not installed
from transformers import AutoModelForCausalLM

first, second = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True).eval()
probe, logits = torch.load(first + "/probe.pt"), torch.load(first + "/logits.pt")
assert torch.equal(model(probe).logits, logits)
model.resize_token_embeddings(112)
model.save_pretrained(second)
again = AutoModelForCausalLM.from_pretrained(second, trust_remote_code=True).eval()
assert torch.equal(again(probe).logits, model(probe).logits)
options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
plain = again.generate(probe[:1], **options)
options |= {"cache_implementation": "static", "prefill_chunk_size": 5, "disable_compile": True}
chunked = again.generate(probe[:1], **options)
assert torch.equal(plain, chunked)
"""


def train_(model, tokens, folder):
    """Train with transformers' Trainer, gradient checkpointing and bfloat16."""
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    Trainer(model, TrainingArguments(str(folder), **TRAINING), train_dataset=rows).train()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_supervised_fine_tuning_with_trl(tokens, tmp_path):
    trl = pytest.importorskip("trl")
    model = flapkit.load("builtin:tiny-llama", "float32")
    flapkit.prune_(model, tokens, ratio=0.3)
    flapkit.save(model, tmp_path / "pruned", tokenizer=load_tokenizer("builtin:tiny-llama"))
    # The folder's name alone, as its users do.
    rows = Dataset.from_dict({"text": ["Once upon a time there was a pruned model.", "It was trained further."] * 4})
    settings = trl.SFTConfig(str(tmp_path / "sft"), **TRAINING)
    trainer = trl.SFTTrainer(str(tmp_path / "pruned"), args=settings, train_dataset=rows)
    assert trainer.model.num_parameters() == model.num_parameters()
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert len(moved(before, trainer.model)) == len(list(trainer.model.parameters()))


def moved(before, model):
    return [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_a_long_chain(tokens, probe, tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    dense = make_llama(num_key_value_heads=2)
    model = copy.deepcopy(dense)
    first = flapkit.prune_(model, tokens, ratio=0.3)

    # A draft for the dense model: its greedy text stays the dense model's.
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        dense.generate(probe[:1], assistant_model=model, **options), dense.generate(probe[:1], **options)
    )

    # All weights move, the new biases too.
    before = copy.deepcopy(model.state_dict())
    train_(model, tokens, tmp_path / "trainer")
    assert len(moved(before, model)) == len(list(model.parameters()))

    # PEFT knows the targets of the dense model's type.
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name} == {"q_proj", "v_proj"}
    train_(adapted, tokens, tmp_path / "lora")
    model = adapted.merge_and_unload().eval()

    model.resize_token_embeddings(104)
    flapkit.save(model, tmp_path / "first")
    torch.save(probe, tmp_path / "first" / "probe.pt")
    # Not the trained model's: the Trainer leaves it computing in bfloat16.
    again = flapkit.load(tmp_path / "first")
    assert not moved(model.state_dict(), again)
    torch.save(again(probe).logits.detach(), tmp_path / "first" / "logits.pt")
    run_without_flapkit(WITHOUT_FLAPKIT, [tmp_path / "first", tmp_path / "second"])
    saved = flapkit.load(tmp_path / "second")
    assert saved.config.vocab_size == 112

    # Pruned again, from the folder: the plans compose to the dense model's indices.
    second = flapkit.prune_(again, tokens, ratio=0.3)
    composed = plan_of(again)
    for site, kept in second.keep.items():
        assert composed.keep[site] == tuple(first.keep[site][unit] for unit in kept)
    flapkit.save(again, tmp_path / "third")
    assert PruningPlan.read(tmp_path / "third" / "plan.json") == composed
    assert flapkit.load(tmp_path / "third").num_parameters() < model.num_parameters()
