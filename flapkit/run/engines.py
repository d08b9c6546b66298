"""The programs besides transformers whose speed is measured: llama.cpp and vLLM."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from flapkit.checkpoint.load import DType, load_config
from flapkit.checkpoint.serving import vllm_obstacle
from flapkit.evaluation.speed import Seconds, Workload, draw_tokens, read_params
from flapkit.model.classes import pruned_classes
from flapkit.model.costs import bytes_of
from flapkit.model.declaration import declaration_of
from flapkit.model.empty import skeleton
from flapkit.model.layout import sites_of
from flapkit.model.registration import is_pruned
from flapkit.run import vllm_worker
from flapkit.system.errors import InputError, RunError

EngineName = Literal["transformers", "llama.cpp", "vllm"]

SHORTEST = 1e-9
"""Seconds of a generation whose time is lost in that of the prefill."""

CACHE_BLOCK = 128
"""Most tokens of a block of vLLM's KV cache on a CPU."""

FLOAT32 = 4
"""Bytes of a number."""

ERROR = re.compile(r"\w+(?:Error|Exception): .*")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Engine(ABC):
    """A model in another program.

    Args:
        path: the model.
        workload: what will be timed.
        device: ``cpu`` or ``cuda``.
        dtype: type of the weights.
        models: number of models in the device's memory.
    """

    package: ClassVar[str]
    """Import name of the program's Python package."""

    distribution: ClassVar[str]
    """Its name for pip."""

    params: int
    """Number of parameters."""

    read_params: int
    """Parameters used for every token: all but an embedding that is only looked up."""

    weights: int
    """Bytes of all parameters."""

    version: str
    """The program and its version."""

    @abstractmethod
    def __init__(self, path: str, workload: Workload, device: str, dtype: DType, models: int) -> None: ...

    @abstractmethod
    def run(self) -> Seconds:
        """Run once; return the seconds of the prefill, until the first token, and of the generation."""

    @classmethod
    @abstractmethod
    def check(cls, path: str, workload: Workload, dtype: DType) -> None:
        """Raise ``InputError`` if a model, a workload or a type is not the program's."""

    @classmethod
    def check_installed(cls, name: str) -> None:
        """Raise ``InputError`` if the program is not installed."""
        if importlib.util.find_spec(cls.package) is None:
            raise InputError(f"bench: engine {name} is not installed; install it with: pip install {cls.distribution}")

    def close(self) -> None:
        """Free the model."""
        return


class LlamaCpp(Engine):
    """A GGUF file in llama.cpp."""

    package = "llama_cpp"
    distribution = "llama-cpp-python"

    def __init__(self, path: str, workload: Workload, device: str, dtype: DType, models: int) -> None:
        import gguf
        import llama_cpp

        tensors = gguf.GGUFReader(path).tensors
        self.params = sum(int(tensor.n_elements) for tensor in tensors)
        table = {tensor.name: int(tensor.n_elements) for tensor in tensors}
        self.read_params = self.params - (table["token_embd.weight"] if "output.weight" in table else 0)
        self.weights = sum(int(tensor.n_bytes) for tensor in tensors)
        self.version = f"{self.distribution} {version(self.distribution)}"
        self._tokens = workload.tokens
        self._model: Any = llama_cpp.Llama(
            path,
            n_ctx=workload.prompt + workload.tokens + 1,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            n_gpu_layers=0 if device == "cpu" else -1,
            verbose=False,
        )
        self._prompt: list[int] = draw_tokens(self._model.n_vocab(), workload)[0].tolist()

    @classmethod
    def check(cls, path: str, workload: Workload, dtype: DType) -> None:
        """Raise ``InputError`` unless it is a GGUF file, in the type that it has, one prompt at a time."""
        if not path.endswith(".gguf") or not Path(path).is_file():
            raise InputError(
                f"bench: engine llama.cpp times GGUF files, and {path} is not one; to write one of a pruned model: "
                "flapkit export CHECKPOINT --to gguf --output FILE"
            )
        if workload.batch_size > 1 or dtype != "auto":
            raise InputError(
                "bench: engine llama.cpp runs one prompt at a time, in the type of the file; leave out --batch-size "
                "and --dtype"
            )

    def run(self) -> Seconds:
        """Evaluate the prompt, then as many tokens one after the other as are to be generated."""
        self._model.reset()
        start = time.perf_counter()
        self._model.eval(self._prompt)
        first = time.perf_counter()
        for token in self._prompt[:1] * self._tokens:
            self._model.eval([token])
        return Seconds(first - start, first - start, time.perf_counter() - first)

    def close(self) -> None:
        """Free the model."""
        self._model.close()


class VLLM(Engine):
    """A checkpoint in vLLM, which runs in a process of its own."""

    package = "vllm"
    distribution = "vllm"

    def __init__(self, path: str, workload: Workload, device: str, dtype: DType, models: int) -> None:
        model = skeleton(load_config(path))
        self.params, self.read_params = model.num_parameters(), read_params(model)
        self.weights = bytes_of(model)
        prompts = draw_tokens(model.config.get_text_config().vocab_size, workload)
        options: dict[str, Any] = {
            "model": path,
            "dtype": dtype,
            "max_model_len": workload.prompt + workload.tokens + 1,
            "max_num_seqs": workload.batch_size,
            "trust_remote_code": has_own_code(path),
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
        }
        if device == "cpu":
            # By default vLLM takes 92 % of the memory, and stops where other programs use more than the rest.
            options["kv_cache_memory_bytes"] = _cache_bytes(model.config.get_text_config(), workload)
        else:
            options["gpu_memory_utilization"] = 0.9 / models
        settings = {"model": options, "prompts": prompts.tolist(), "tokens": workload.tokens}
        self._path, self._opened = path, ExitStack()
        # vLLM writes its messages there.
        messages = tempfile.TemporaryFile(mode="w+", encoding="utf-8")  # noqa: SIM115 - closed with the process
        self._messages = self._opened.enter_context(messages)
        self._process = self._opened.enter_context(
            subprocess.Popen(
                # -P: the folder of the file is no place to import from.
                [sys.executable, "-P", vllm_worker.__file__, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                text=True,
            )
        )
        self.version = f"vllm {self._read()}"

    @classmethod
    def check(cls, path: str, workload: Workload, dtype: DType) -> None:
        """Raise ``InputError`` if the folder's code is not flapkit's, or vLLM does not serve such a pruned model."""
        if not has_own_code(path):
            return
        config = load_config(path)
        if obstacle := vllm_obstacle(config, sites_of(skeleton(config), declaration_of(config))):
            raise InputError(f"bench: engine vllm does not serve {path}: {obstacle}")

    def run(self) -> Seconds:
        """Generate one token, and then again one with as many after it as are to be generated."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        first, whole = self._read()
        return Seconds(first, first, max(whole - first, SHORTEST))

    def close(self) -> None:
        """End the process: it stops where its input ends."""
        self._opened.close()

    def _read(self) -> Any:
        """Read the next answer.

        Raises:
            RunError: the process has ended.
        """
        said = []
        for line in self._process.stdout or ():
            if line.startswith(vllm_worker.MARK):
                return json.loads(line.removeprefix(vllm_worker.MARK))
            said.append(line)
        self._process.wait()
        self._messages.seek(0)
        said += self._messages.readlines()
        self.close()
        raise RunError(f"bench: vLLM stopped while it ran {self._path}: {_cause(said)}")


def _cause(said: Sequence[str]) -> str:
    """Return the first error that a program told of, which led to the others; else the last thing that it said."""
    lines = [ANSI.sub("", line).strip() for line in said if line.strip()]
    errors = (found[0] for line in lines if (found := ERROR.search(line)))
    return next(errors, lines[-1] if lines else "without a message")


def _cache_bytes(config: Any, workload: Workload) -> int:
    """Return the bytes of a KV cache that holds the prompts and what follows them, in blocks of 128 tokens at most.

    Args:
        config: of the language model; the cache is counted as if each query head had its own key and value.
        workload: how many prompts, and how many tokens each.
    """
    blocks = math.ceil((workload.prompt + workload.tokens + 1) / CACHE_BLOCK) + 1
    return int(2 * FLOAT32 * config.num_hidden_layers * config.hidden_size * workload.batch_size * blocks * CACHE_BLOCK)


def has_own_code(path: str) -> bool:
    """Return whether a checkpoint has a modeling file, which vLLM is to run.

    Raises:
        InputError: it is not the one that flapkit writes.
    """
    config = load_config(path)
    classes = pruned_classes(config.model_type) if is_pruned(config) else None
    if classes is None:
        return False
    file = Path(path) / classes.file
    if not file.is_file() or file.read_text(encoding="utf-8") != classes.source:
        raise InputError(
            f"bench: engine vllm runs the modeling file of the folder, and {file} is not the one that this version of "
            f"flapkit writes; to write it again: flapkit.save(flapkit.load({path!r}), FOLDER)"
        )
    return True


ENGINES: Mapping[str, type[Engine]] = {"llama.cpp": LlamaCpp, "vllm": VLLM}
"""The programs besides transformers."""
