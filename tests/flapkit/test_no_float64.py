"""Pruning on a device that has no float64."""

from __future__ import annotations

import pytest
import torch
from conftest import make_llama
from no_float64 import OnDevice, OnThisDevice, place_

import flapkit
from flapkit.api import PruneOptions


def test_the_stand_in_has_no_float64():
    with pytest.raises(TypeError, match="no float64"):
        OnDevice(torch.ones(2)).double()
    with OnThisDevice(), pytest.raises(TypeError, match="no float64"):
        torch.zeros(2, dtype=torch.float64, device="mps")
    with OnThisDevice():
        assert isinstance(OnDevice(torch.ones(2)) + torch.ones(2, device="mps"), OnDevice)
        assert type(OnDevice(torch.ones(2)).cpu().double()) is torch.Tensor


@torch.no_grad()
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("compensator", ["bias", "least_squares"])
def test_pruning_is_that_of_the_cpu(tokens, compensator, sequential, monkeypatch):
    # The stand-in is a subclass of Tensor, as quantised weights are.
    for module in ("soundness", "surgery"):
        monkeypatch.setattr(f"flapkit.model.{module}.check_float_weight", lambda name, weight: None)
    expected, model = make_llama(), make_llama()
    place_(model)
    options = {"ratio": 0.4, "compensator": compensator, "options": PruneOptions(sequential=sequential)}
    plan = flapkit.prune_(expected, tokens, **options)
    with OnThisDevice():
        assert flapkit.prune_(model, tokens, **options) == plan
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.data, OnDevice)
        torch.testing.assert_close(parameter.data.inner, expected.get_parameter(name).data)
