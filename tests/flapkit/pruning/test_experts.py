"""What calibration sees of experts: each its own tokens, and the model's function unchanged."""

from __future__ import annotations

import logging

import pytest
import torch

import flapkit
from flapkit.model.tiny import tiny_config, tiny_model
from flapkit.model.verify import logits_of
from flapkit.pruning.collector import Collector, measure
from flapkit.pruning.experts import watch
from flapkit.pruning.moments import Moments
from flapkit.system.errors import CalibrationError, ModelError


@pytest.fixture(params=["mixtral", "gpt_oss", "qwen2_moe"])
def model(request):
    return tiny_model(tiny_config(request.param))


def windows(count: int) -> torch.Tensor:
    return torch.randint(2, 96, (count, 12), generator=torch.Generator().manual_seed(1))


def test_every_token_is_seen_by_as_many_experts_as_it_is_routed_to(model):
    sites = flapkit.sites(model)
    mask = torch.ones(32, 12, dtype=torch.long)
    mask[:, :5] = 0
    found = measure(model, sites, [Moments], [{"input_ids": windows(32), "attention_mask": mask}])
    for layer in range(2):
        seen = [found[site.name][Moments].tokens for site in sites if site.layer == layer and site.expert is not None]
        assert sum(seen) == 2 * int(mask.sum())


def test_watching_changes_nothing(model):
    expected = logits_of(model)
    with Collector(model, flapkit.sites(model), [Moments]) as collector:
        collector.begin({"input_ids": windows(2)[:, :10]})
        collector._attended = torch.ones(2, 10, dtype=torch.bool)
        hidden = model(windows(2)[:, :10]).logits
    torch.testing.assert_close(hidden, model(windows(2)[:, :10]).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits_of(model), expected)
    assert all("forward" not in vars(module) for module in model.modules())


def test_an_expert_without_tokens_is_named():
    model = tiny_model(tiny_config("mixtral"))
    with pytest.raises(
        CalibrationError, match=r"experts received fewer than two tokens \(first: layers\.\d\.experts\.\d"
    ):
        flapkit.prune_(model, windows(1)[:, :3])


def test_an_expert_with_few_tokens_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="flapkit"):
        flapkit.prune_(tiny_model(tiny_config("mixtral")), windows(20))
    assert "experts received fewer than 128 tokens" in caplog.text


def test_experts_that_say_nothing_of_their_layout():
    with pytest.raises(ModelError, match="missing attributes has_gate, has_bias, is_transposed"):
        watch(torch.nn.Linear(2, 2), lambda *seen: None)
