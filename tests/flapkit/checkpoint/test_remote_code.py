from __future__ import annotations

import os
import subprocess
import sys

import torch
from conftest import make_llama

import flapkit

SCRIPT = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
sys.modules["flapkit"] = None  # as if it were not installed
folder, probe, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
assert torch.equal(model(torch.load(probe)).logits, torch.load(logits))
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "FlapkitLlamaModel"
"""


def test_loads_without_flapkit(tokens, probe, tmp_path):
    model = make_llama(num_key_value_heads=2)
    flapkit.save(model, tmp_path / "pruned", flapkit.prune_(model, tokens, ratio=0.4))
    torch.save(probe, tmp_path / "probe.pt")
    torch.save(model(probe).logits.detach(), tmp_path / "logits.pt")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "pruned", tmp_path / "probe.pt", tmp_path / "logits.pt"],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
