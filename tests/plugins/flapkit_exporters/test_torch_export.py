from __future__ import annotations

import torch

import flapkit
from flapkit.checkpoint.export import export
from flapkit.registry import EXPORTER, Registry


@torch.no_grad()
def test_any_batch_and_length(pruned_folder, tmp_path):
    found = export(pruned_folder, Registry.load().create(EXPORTER, "torch-export"), tmp_path / "out.pt2")
    assert found.relative < 1e-5
    program, model = torch.export.load(tmp_path / "out.pt2").module(), flapkit.load(pruned_folder)
    for shape in ((1, 1), (3, 40)):
        tokens = torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(program(tokens), model(tokens).logits, atol=1e-5, rtol=1e-5)
