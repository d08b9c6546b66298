from __future__ import annotations

import pytest
import torch

import flapkit
from flapkit.checkpoint.export import export
from flapkit.registry import EXPORTER, Registry
from flapkit.system.errors import InputError


def onnx(**options):
    return Registry.load().create(EXPORTER, "onnx", options)


@pytest.mark.slow
@torch.no_grad()
def test_any_batch_and_length_in_onnxruntime(pruned_folder, tmp_path):
    import onnxruntime

    found = export(pruned_folder, onnx(), tmp_path / "out")
    assert found.relative < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    model = flapkit.load(pruned_folder)
    for shape in ((1, 1), (3, 40)):
        tokens = torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(1))
        (logits,) = session.run(None, {"input_ids": tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_missing_package(pruned_folder, tmp_path, without):
    without("onnx", "onnxscript", "onnxruntime")
    with pytest.raises(InputError, match=r"needs onnx and onnxscript and onnxruntime.*flapkit\[onnx\]"):
        export(pruned_folder, onnx(), tmp_path / "out")
