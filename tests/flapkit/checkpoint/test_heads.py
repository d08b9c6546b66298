"""Classifiers are pruned, saved and loaded by their Auto class, as language models are."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from classifiers import FAMILIES, classifier
from transformers import AutoModel, LlamaForQuestionAnswering

import flapkit
from flapkit.model.classes import HEADS, pruned_classes
from flapkit.model.history import plan_of
from flapkit.model.surgery import mask_
from flapkit.model.tiny import tiny_config
from flapkit.system.errors import ModelError


@torch.no_grad()
@pytest.mark.parametrize("auto", HEADS[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_classifiers(family, auto, tokens, probe, tmp_path):
    if auto not in pruned_classes(family).heads:
        pytest.skip("there is no such model")
    model = classifier(family, auto)
    dense, masked, sites = model.num_parameters(), copy.deepcopy(model), flapkit.sites(model)
    plan = flapkit.prune_(model, tokens, ratio=0.4, compensator="none")
    assert dense - model.num_parameters() == plan.removed_params(sites)
    mask_(masked, sites, plan)
    expected = outputs(model, probe)
    for one, other in zip(expected, outputs(masked, probe), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)

    flapkit.save(model, tmp_path / "pruned")
    again = getattr(transformers, auto).from_pretrained(tmp_path / "pruned").eval()
    assert (again.config.num_labels, again.config.pad_token_id) == (3, 0)
    assert all(map(torch.equal, outputs(copy.deepcopy(again), probe), outputs(copy.deepcopy(model), probe)))
    flapkit.prune_(again, tokens, ratio=0.2, compensator="none")
    flapkit.prune_(model, tokens, ratio=0.2, compensator="none")
    assert plan_of(again) == plan_of(model)
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert f"{auto}.from_pretrained" in card
    assert "flapkit.load" not in card


def outputs(model, probe):
    given = model(probe, attention_mask=torch.ones_like(probe))
    return [given[name] for name in ("logits", "start_logits", "end_logits") if name in given]


def test_a_classifier_trains_after_slicing(tokens):
    model = classifier("llama", "AutoModelForSequenceClassification").train()
    flapkit.prune_(model, tokens, ratio=0.4)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens[:, 0] % 3).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    # The embedding's padding row stays, and rows of tokens that do not occur.
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("options", [{"metric": "taylor"}, {"metric": "kfac"}, {"searcher": "optuna"}])
def test_what_needs_a_language_model_is_refused(tokens, options):
    model = classifier("llama", "AutoModelForTokenClassification")
    with pytest.raises(ModelError, match="needs the loss of a language model, and this is a LlamaForTokenClassif"):
        flapkit.prune_(model, tokens, **options)


@pytest.mark.parametrize("of", [LlamaForQuestionAnswering, AutoModel.from_config])
def test_a_model_that_could_not_be_saved_is_not_pruned(tokens, of):
    model = of(tiny_config("llama"))
    parameters = model.num_parameters()
    with pytest.raises(ModelError, match=r"no class to save a pruned Llama.*it can save LlamaForCausalLM, LlamaForSeq"):
        flapkit.prune_(model, tokens)
    assert model.num_parameters() == parameters


@pytest.mark.parametrize("is_pruned", [False, True])
def test_commands_take_language_models(tokens, tmp_path, is_pruned):
    model = classifier("llama", "AutoModelForSequenceClassification")
    if is_pruned:
        flapkit.prune_(model, tokens, ratio=0.4)
        flapkit.save(model, tmp_path / "classifier")
    else:
        model.save_pretrained(tmp_path / "classifier")
    with pytest.raises(ModelError, match="load it with transformers' AutoModelForSequenceClassification"):
        flapkit.load(tmp_path / "classifier")


@pytest.mark.parametrize("auto", HEADS[1:3])
def test_a_pruned_language_model_becomes_a_classifier(llama, tokens, probe, tmp_path, auto):
    flapkit.prune_(llama, tokens, ratio=0.4)
    flapkit.save(llama, tmp_path / "pruned")
    model = getattr(transformers, auto).from_pretrained(tmp_path / "pruned", num_labels=3).eval()
    assert torch.equal(model.base_model(probe).last_hidden_state, llama.base_model(probe).last_hidden_state)
    flapkit.save(model, tmp_path / "classifier")
    again = getattr(transformers, auto).from_pretrained(tmp_path / "classifier").eval()
    assert torch.equal(again(probe[:1])[0], model(probe[:1])[0])
    assert plan_of(again) is None
    flapkit.prune_(again, tokens, ratio=0.1)
    flapkit.prune_(llama, tokens, ratio=0.1)
    assert plan_of(again) == plan_of(llama)
