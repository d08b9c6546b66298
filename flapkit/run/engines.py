"""The programs besides transformers whose speed is measured: llama.cpp and vLLM."""

from __future__ import annotations

import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal

import torch

from flapkit.checkpoint.load import DType, load_config
from flapkit.evaluation.speed import Workload, read_params
from flapkit.model.classes import pruned_classes
from flapkit.model.empty import skeleton
from flapkit.model.registration import PREFIX
from flapkit.system.errors import InputError

EngineName = Literal["transformers", "llama.cpp", "vllm"]


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

    @abstractmethod
    def __init__(self, path: str, workload: Workload, device: str, dtype: DType, models: int) -> None: ...

    @abstractmethod
    def run(self) -> tuple[float, float, float]:
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

    @classmethod
    def version(cls) -> str:
        """Return the version of the program's package."""
        return f"{cls.distribution} {version(cls.distribution)}"


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
        self._tokens = workload.tokens
        self._model = llama_cpp.Llama(
            path,
            n_ctx=workload.prompt + workload.tokens + 1,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            n_gpu_layers=0 if device == "cpu" else -1,
            verbose=False,
        )
        draw = torch.Generator().manual_seed(workload.seed)
        self._prompt: list[int] = torch.randint(self._model.n_vocab(), (workload.prompt,), generator=draw).tolist()

    @classmethod
    def check(cls, path: str, workload: Workload, dtype: DType) -> None:
        """Raise ``InputError`` unless it is a GGUF file, in the type that it has, one prompt at a time."""
        if not path.endswith(".gguf") or not Path(path).is_file():
            raise InputError(
                f"bench: engine llama.cpp times GGUF files, and {path} is none; to write one of a pruned model: "
                "flapkit export CHECKPOINT --to gguf --output FILE"
            )
        if workload.batch_size > 1 or dtype != "auto":
            raise InputError(
                "bench: engine llama.cpp runs one prompt at a time, in the type of the file; leave out --batch-size "
                "and --dtype"
            )

    def run(self) -> tuple[float, float, float]:
        """Evaluate the prompt, then as many tokens one after the other as are to be generated."""
        self._model.reset()
        start = time.perf_counter()
        self._model.eval(self._prompt)
        first = time.perf_counter()
        for token in self._prompt[:1] * self._tokens:
            self._model.eval([token])
        return first - start, first - start, time.perf_counter() - first


class VLLM(Engine):
    """A checkpoint in vLLM, without the graphs that it would capture on a GPU."""

    package = "vllm"
    distribution = "vllm"

    def __init__(self, path: str, workload: Workload, device: str, dtype: DType, models: int) -> None:
        from vllm import LLM, SamplingParams

        model = skeleton(load_config(path))
        self.params, self.read_params = model.num_parameters(), read_params(model)
        self.weights = sum(parameter.nbytes for parameter in model.parameters())
        self._model = LLM(
            path,
            dtype=dtype,
            max_model_len=workload.prompt + workload.tokens + 1,
            max_num_seqs=workload.batch_size,
            trust_remote_code=has_own_code(path),
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            **({} if device == "cpu" else {"gpu_memory_utilization": 0.9 / models}),
        )
        draw = torch.Generator().manual_seed(workload.seed)
        shape = (workload.batch_size, workload.prompt)
        prompts = torch.randint(model.config.get_text_config().vocab_size, shape, generator=draw).tolist()
        self._prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
        self._first, self._all = (
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in (1, workload.tokens + 1)
        )

    @classmethod
    def check(cls, path: str, workload: Workload, dtype: DType) -> None:
        """Raise ``InputError`` if the folder's code is not flapkit's."""
        has_own_code(path)

    def run(self) -> tuple[float, float, float]:
        """Generate one token, and then again one with as many after it as are to be generated."""
        start = time.perf_counter()
        self._model.generate(self._prompts, self._first, use_tqdm=False)
        middle = time.perf_counter()
        self._model.generate(self._prompts, self._all, use_tqdm=False)
        first = middle - start
        return first, first, max(time.perf_counter() - middle - first, 1e-9)

    @classmethod
    def version(cls) -> str:
        """Return vLLM's version; its build for CPUs is a package of another name."""
        import vllm

        return f"vllm {vllm.__version__}"


def has_own_code(path: str) -> bool:
    """Return whether a checkpoint has a modeling file, which vLLM is to run.

    Raises:
        InputError: it is not the one that flapkit writes.
    """
    config = load_config(path)
    classes = pruned_classes(config.model_type) if config.model_type.startswith(PREFIX) else None
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
