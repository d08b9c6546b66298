"""GGUF files as models: dequantised once into a checkpoint in flapkit's cache, which then serves as any other does."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flapkit.model.precision import name_of
from flapkit.system.errors import ModelError, is_panic
from flapkit.system.paths import cache_folder

if TYPE_CHECKING:
    from gguf import GGUFReader

SUFFIX = ".gguf"
FOLDER = "gguf"
"""Where dequantised files are, in the cache."""

SOURCE = "source.txt"
"""The file, in a dequantised checkpoint, that names the GGUF file."""

MAGIC = b"GGUF"

log = logging.getLogger(__name__)


def dequantised(file: Path) -> Path:
    """Return the folder of a GGUF file's checkpoint, which is made when the file is first used, or changed.

    The checkpoint has the type of the file's matrices where that is F16 or BF16, and float32 otherwise.

    Args:
        file: a GGUF file that exists.

    Raises:
        ModelError: the file is damaged, or holds what transformers cannot read.
    """
    found = file.resolve().stat()
    parts = [str(file.resolve()), found.st_size, found.st_mtime_ns, version("transformers"), version("gguf")]
    folder = cache_folder() / FOLDER / hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    dtype = _check(file)
    log.info("%s: its weights are dequantised to %s, in %s", file, name_of(dtype), folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        try:
            _convert(file, partial, dtype)
            if not folder.is_dir():
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except BaseException as error:
        # transformers can raise anything on a file that it does not understand.
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise ModelError(f"model {file}: cannot be read: {type(error).__name__}: {error}") from error
    return folder


def _check(file: Path) -> torch.dtype:
    """Check that a file can be read and dequantised; return the type of its checkpoint."""
    reader = _open(file)
    field = reader.fields.get("general.architecture")
    architecture = str(field.contents()) if field else "none"
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    # What is no name of an architecture in this list of transformers' is left out.
    known = [name for name in GGUF_SUPPORTED_ARCHITECTURES if name not in ("general", "tokenizer", "deci")]
    if architecture.replace("-", "_") not in known and architecture.replace("moe", "_moe") not in known:
        hint = "; a model that flapkit exported is pruned further from its checkpoint" if architecture == "deci" else ""
        raise ModelError(
            f"model {file}: transformers cannot read GGUF files of the architecture {architecture!r} (it reads "
            f"{', '.join(known)}){hint}"
        )
    _check_types(file, reader)
    types = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(types.pop() if len(types) == 1 else "", torch.float32)


def _open(file: Path) -> GGUFReader:
    import gguf

    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"model {file}: not a GGUF file: it does not begin with {MAGIC.decode()}")
    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:
        # The reader raises whatever numpy does where bytes are missing.
        raise ModelError(
            f"model {file}: damaged or incomplete ({type(error).__name__}: {error}); download it again"
        ) from error
    return reader


def _check_types(file: Path, reader: GGUFReader) -> None:
    """Dequantise a block of one tensor of each type."""
    import gguf

    first = {tensor.tensor_type: tensor for tensor in reversed(reader.tensors)}
    for kind, tensor in first.items():
        try:
            gguf.dequantize(tensor.data[:1], kind)
        except NotImplementedError as error:
            raise ModelError(
                f"model {file}: {tensor.name} is of the type {kind.name}, which the package gguf cannot dequantise; "
                "use another file of the model, such as Q8_0 or F16"
            ) from error


def _convert(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a GGUF file's weights, configuration and tokenizer as transformers would have them."""
    import transformers

    load_model: Any = transformers.AutoModelForCausalLM.from_pretrained
    load_tokenizer: Any = transformers.AutoTokenizer.from_pretrained
    options = {"gguf_file": file.name, "trust_remote_code": False}
    parent = os.fspath(file.resolve().parent)
    loaded, info = load_model(parent, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"it is incomplete; missing weights: {', '.join(missing[:3])}")
    config = loaded.config
    # The weights are no longer quantised, and the class of the loaded model cannot be saved.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    model.save_pretrained(folder)
    _with_pre_tokenizer(file, load_tokenizer(parent, **options)).save_pretrained(folder)
    (folder / SOURCE).write_text(f"{file.resolve()}\n", encoding="utf-8")


def _with_pre_tokenizer(file: Path, tokenizer: Any) -> Any:
    """Return a tokenizer that splits text into words as the file says; transformers goes by the architecture alone."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = _open(file).fields.get("tokenizer.ggml.pre")
    name = str(field.contents()) if field else "default"
    backend = tokenizer.backend_tokenizer
    words = ByteLevel(add_prefix_space=False)
    known = {"gpt-2": words, "smollm": Sequence([Digits(individual_digits=True), words])}
    if name in known:
        backend.pre_tokenizer = known[name]
        special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        # Not its own class, which has a pre-tokenizer of its own.
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        made.chat_template = tokenizer.chat_template
        return made
    if name != "default" and isinstance(backend.pre_tokenizer, ByteLevel):
        log.warning(
            "%s: the pre-tokenizer %r is replaced by GPT-2's, so tokens may differ from the original model's; to avoid "
            "this, use a checkpoint with the original tokenizer",
            file,
            name,
        )
    return tokenizer
