"""Load models, configurations and tokenizers from a folder, the hub, or what flapkit brings along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flapkit.bundled import PREFIX, bundled_models
from flapkit.checkpoint.consistency import check_plan, check_shapes
from flapkit.checkpoint.families import PREFIX as PRUNED
from flapkit.checkpoint.families import register
from flapkit.checkpoint.folder import PLAN
from flapkit.checkpoint.weights import INDEX, Weights
from flapkit.errors import ModelError, did_you_mean

DType = Literal["auto", "float32", "float16", "bfloat16"]

PARTS = ("*.safetensors", "*.json")
"""What is fetched of a hub model whose weights are read one by one."""

WEIGHTS = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

T = TypeVar("T")


def load(
    path: Path | str,
    dtype: DType | torch.dtype = "auto",
    *,
    revision: str | None = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """Load a causal language model, pruned or dense.

    Args:
        path: a folder, a Hugging Face hub id, or ``builtin:NAME``.
        dtype: type of the weights; ``auto`` is the checkpoint's own.
        revision: branch, tag or commit of a hub model.
        device_map: as transformers takes it.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: the model is missing, incomplete, damaged, pickled or quantised, or the parts of a pruned checkpoint
            do not belong together.
    """
    source = _source(path)
    config = load_config(path, revision=revision)
    _refuse_quantised(path, config)
    if isinstance(source, Path):
        _check_weights(path, source)
        if config.model_type.startswith(PRUNED):
            _check_pruned(path, source, config)
    type_ = dtype if isinstance(dtype, torch.dtype) or dtype == "auto" else getattr(torch, dtype)
    load_model: Any = AutoModelForCausalLM.from_pretrained
    model, info = _call(
        path,
        lambda: load_model(
            str(source),
            config=config,
            dtype=type_,
            revision=revision or "main",
            device_map=device_map,
            use_safetensors=True,
            output_loading_info=True,
        ),
    )
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"model {path}: its weights lack {shown}; the checkpoint is not whole")
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_config(path: Path | str, *, revision: str | None = None) -> PreTrainedConfig:
    """Load a model's configuration alone; no weights are read.

    Args:
        path: a folder, a hub id, or ``builtin:NAME``.
        revision: branch, tag or commit of a hub model.

    Raises:
        ModelError: there is no such model, or its configuration cannot be read.
    """
    register()
    source = _source(path)
    config: PreTrainedConfig = _call(path, lambda: AutoConfig.from_pretrained(str(source), revision=revision or "main"))
    return config


def load_tokenizer(path: Path | str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        path: a folder, a hub id, or ``builtin:NAME``.
        revision: branch, tag or commit of a hub model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    source = _source(path)
    tokenizer: PreTrainedTokenizerBase = _call(
        path, lambda: AutoTokenizer.from_pretrained(str(source), revision=revision or "main"), what="tokenizer"
    )
    return tokenizer


def open_weights(path: Path | str, *, revision: str | None = None) -> Weights:
    """Find a checkpoint's tensors, to read them one by one; tied ones come once.

    Args:
        path: a folder, a hub id, or ``builtin:NAME``.
        revision: branch, tag or commit of a hub model.

    Raises:
        ModelError: the model is missing, damaged, pickled or quantised.
    """
    source = _source(path)
    _refuse_quantised(path, load_config(path, revision=revision))
    if isinstance(source, str):
        hub = source
        source = Path(_call(path, lambda: str(snapshot_download(hub, revision=revision, allow_patterns=[*PARTS]))))
    _check_weights(path, source)
    return Weights.of(_weight_files(path, source))


def _source(path: Path | str) -> Path | str:
    """Resolve a model's name to a folder that is there, or to a hub id."""
    name = str(path)
    if name.startswith(PREFIX):
        bundled = bundled_models()
        if name.removeprefix(PREFIX) not in bundled:
            known = [PREFIX + model for model in bundled]
            raise ModelError(f"model {name}: flapkit brings no such model along{did_you_mean(name, known)}")
        return bundled[name.removeprefix(PREFIX)]
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model {name}: the folder holds no config.json; name the folder that does")
        return folder
    if folder.exists():
        raise ModelError(f"model {name}: this is a file; name the folder of a Hugging Face checkpoint")
    if isinstance(path, Path) or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(f"model {name}: there is no such folder")
    return name


def _refuse_quantised(name: Path | str, config: PreTrainedConfig) -> None:
    if getattr(config, "quantization_config", None):
        raise ModelError(f"model {name}: its weights are quantised; give the model in float32, float16 or bfloat16")


def _check_weights(name: Path | str, folder: Path) -> None:
    """Find damaged files by their names before transformers stumbles over them."""
    for file in _weight_files(name, folder):
        if not file.is_file():
            raise ModelError(f"model {name}: {file.name} is missing, though {INDEX} names it")
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"model {name}: {file.name} is damaged or cut short ({error}); fetch or write it again"
            ) from error


def _check_pruned(name: Path | str, folder: Path, config: PreTrainedConfig) -> None:
    """Find tensors, and a plan, that are not those of the configuration."""
    check_shapes(name, config, _weight_files(name, folder))
    if (folder / PLAN).is_file():
        check_plan(name, config, (folder / PLAN).read_text(encoding="utf-8"))


def _weight_files(name: Path | str, folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"model {name}: {INDEX} is damaged: {error!r}") from error
        return [folder / shard for shard in sorted(set(shards))]
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        raise ModelError(
            f"model {name}: its weights are pickled, which can run any code; convert them to safetensors first"
        )
    raise ModelError(f"model {name}: the folder holds no weights ({WEIGHTS} or {INDEX})")


def _call(path: Path | str, loader: Callable[[], T], what: str = "model") -> T:
    try:
        return loader()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{what} {path}: cannot be loaded: {' '.join(text)}") from error
