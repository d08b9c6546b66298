from __future__ import annotations

import importlib.util

import pytest

from flapkit.evaluation.speed import Seconds, Workload
from flapkit.run import engines
from flapkit.run.bench import bench
from flapkit.system.errors import InputError, RunError

SMALL = Workload(prompt=4, tokens=2, repetitions=2, warm_up=1)


class Fake(engines.Engine):
    """A program in which a model takes as many seconds for a token as its name has letters."""

    package = distribution = "pluggy"
    order: list[str] = []  # noqa: RUF012

    def __init__(self, path, workload, device, dtype, models):
        self.path, self.tokens = path, workload.tokens
        self.params = self.read_params = self.weights = 100 * len(path)
        self.version = "fake 1"

    @classmethod
    def check(cls, path, workload, dtype):
        if dtype == "float16":
            raise InputError("not in float16")

    def run(self):
        self.order.append(self.path)
        return Seconds(1.0, 1.5, float(self.tokens * len(self.path)))

    def close(self):
        self.order.append("closed")


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(Fake, "order", [])
    monkeypatch.setitem(engines.ENGINES, "llama.cpp", Fake)


def test_models_take_turns_in_another_program(fake):
    found = bench("ab.gguf", "abcdefghi.gguf", SMALL, engine="llama.cpp", device="cpu")
    assert Fake.order == ["abcdefghi.gguf", "ab.gguf"] * 3 + ["closed"] * 2
    assert found.ratios["decode"] == found.expected == 2
    assert "decode_macs" not in found.ratios
    assert found.reasons == ["prefill is 1.00 times the dense model's, expected 2.00"]
    assert found.environment["version"] == "fake 1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compiled": True}, "--compile works only with the engine transformers"),
        ({"dtype": "float16"}, "not in float16"),
    ],
)
def test_options_that_a_program_has_not(fake, options, message):
    with pytest.raises(InputError, match=message):
        bench("ab.gguf", None, SMALL, engine="llama.cpp", device="cpu", **options)
    assert Fake.order == []


@pytest.mark.parametrize("name", engines.ENGINES)
def test_a_program_that_is_not_installed(command, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    code, _, error = command("bench", "builtin:tiny-llama", "--engine", name)
    assert code
    assert f"engine {name} is not installed; install it with: pip install" in error
    assert error.count("\n") == 1


def test_llama_cpp_takes_files_one_prompt_at_a_time(tmp_path):
    check = engines.LlamaCpp.check
    with pytest.raises(InputError, match=r"times GGUF files, and builtin:tiny-llama is not one.*--to gguf"):
        check("builtin:tiny-llama", SMALL, "auto")
    (tmp_path / "a.gguf").touch()
    check(str(tmp_path / "a.gguf"), SMALL, "auto")
    with pytest.raises(InputError, match="leave out --batch-size and --dtype"):
        check(str(tmp_path / "a.gguf"), Workload(batch_size=2), "auto")


def test_vllm_runs_no_code_but_flapkits(pruned_folder):
    assert engines.has_own_code(str(pruned_folder))
    assert not engines.has_own_code("builtin:tiny-llama")
    file = pruned_folder / "modeling_flapkit_llama.py"
    file.write_text(file.read_text(encoding="utf-8") + "\nprint('changed')\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"modeling_flapkit_llama\.py was changed: its SHA-256 is not"):
        engines.has_own_code(str(pruned_folder))


FAKE_VLLM = """
import sys
__version__ = "0.0"
assert "flapkit" not in sys.modules

class SamplingParams:
    def __init__(self, max_tokens, **options):
        self.tokens = max_tokens

class LLM:
    def __init__(self, model, max_model_len, trust_remote_code, **options):
        assert options["kv_cache_memory_bytes"] > 0
        if options["max_num_seqs"] > 2:
            print("\\x1b[31m(Worker pid=1) ERROR\\x1b[0m ValueError: too many", flush=True)
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        print("vLLM says this and that")
        self.length = max_model_len
    def generate(self, prompts, sampling, use_tqdm):
        assert len(prompts[0]["prompt_token_ids"]) + sampling.tokens <= self.length
"""


def test_vllm_runs_in_a_process_without_flapkit(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    found = bench("builtin:tiny-llama", None, SMALL, engine="vllm", device="cpu")
    assert found.environment["version"] == "vllm 0.0"
    assert len(found.speeds["builtin:tiny-llama"].decode.values) == 2
    with pytest.raises(RunError, match=r"vLLM stopped while it ran builtin:tiny-llama: ValueError: too many$"):
        bench("builtin:tiny-llama", None, Workload(batch_size=3, prompt=4, tokens=2), engine="vllm", device="cpu")
