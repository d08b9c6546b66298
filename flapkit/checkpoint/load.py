"""Load models, configurations and tokenizers from a folder, the hub, or the models bundled with flapkit."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

from flapkit.checkpoint.bundled import PREFIX, bundled_models
from flapkit.checkpoint.card import is_hub_id
from flapkit.checkpoint.consistency import check_settings, check_shapes, check_size, read_plan
from flapkit.checkpoint.folder import PLAN
from flapkit.checkpoint.gguf import SUFFIX as GGUF
from flapkit.checkpoint.gguf import dequantised
from flapkit.checkpoint.modeling_file import check_modeling_file
from flapkit.checkpoint.ties import calls_tied, untie_
from flapkit.checkpoint.weights import INDEX, Weights
from flapkit.model.classes import HEADS
from flapkit.model.empty import CAUSAL_LM, auto_class, check_depth
from flapkit.model.history import plan_of, set_plan_
from flapkit.model.registration import is_pruned
from flapkit.model.soundness import STORED_FLOATS, check_unquantised, check_weights
from flapkit.model.spread import check_accelerate
from flapkit.system.errors import InputError, ModelError, did_you_mean, is_panic
from flapkit.system.json_files import parse_json
from flapkit.system.paths import to_path, within

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DType = Literal["auto", "float32", "float16", "bfloat16"]

PARTS = ("*.safetensors", "*.json")
"""Files to download of a hub model whose weights are read one by one."""

WEIGHTS = "model.safetensors"
MAX_TOKEN_ID = 10_000_000
"""A tokenizer with larger token ids is damaged."""

PROCESSOR = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""Files of a vision-language model's processor, beside those of its tokenizer."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

T = TypeVar("T")

log = logging.getLogger(__name__)


def load(
    path: Path | str,
    dtype: DType | torch.dtype = "auto",
    *,
    revision: str | None = None,
    device_map: Any = None,
) -> PreTrainedModel:
    """Load a language model, pruned or dense; one within a vision-language model is loaded with all of it.

    Args:
        path: a folder, a Hugging Face hub id, a GGUF file, or ``builtin:NAME``.
        dtype: data type of the weights; ``auto`` is that of the checkpoint.
        revision: branch, tag or commit of a hub model.
        device_map: spreads the model over devices by accelerate; passed to transformers.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: the model is missing, incomplete, damaged, pickled or quantised, or the parts of a pruned checkpoint
            do not fit each other.
    """
    import transformers

    check_accelerate(device_map)
    source, stored = _source(path, revision), {}
    config = load_config(path, revision=revision)
    check_language_model(path, config)
    check_unquantised(path, config)
    if isinstance(source, Path):
        stored = _check_files(path, source)
        if is_pruned(config):
            _check_pruned(path, source, config)
        else:
            check_size(path, config, _weight_files(path, source))
    type_ = dtype if isinstance(dtype, torch.dtype) or dtype == "auto" else getattr(torch, dtype)
    load_model: Any = getattr(transformers, auto_class(config.model_type) or CAUSAL_LM).from_pretrained
    model, info = _call(
        path,
        lambda: load_model(
            str(source),
            config=config,
            dtype=type_,
            revision=revision or "main",
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        ),
    )
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"model {path}: the checkpoint is incomplete; missing weights: {_shorten(missing)}")
    if unexpected := sorted(info["unexpected_keys"]):
        log.warning("model %s: ignored weights that the model does not have: %s", path, _shorten(unexpected))
    check_weights(path, model.named_parameters(), stored)
    restore_plan_(model)
    loaded: PreTrainedModel = model.eval()
    return loaded


def restore_plan_(model: PreTrainedModel) -> None:
    """Let a pruned model carry the plan of the checkpoint that it was loaded from, unless it carries one.

    Args:
        model: a model, from transformers or from flapkit; of a dense one, and where there is no plan, nothing is done.

    Raises:
        ModelError: the plan is damaged, or not the model's.
    """
    config = model.config
    if plan_of(model) is not None or not is_pruned(config):
        return
    name = config.name_or_path or ""
    path = _plan_file(name, getattr(config, "_commit_hash", None))
    if path is not None:
        set_plan_(model, read_plan(name, config, path))


def _plan_file(name: str, revision: str | None) -> Path | None:
    """Find the plan of a checkpoint in a folder, or on the hub."""
    if is_hub_id(name):
        try:
            return Path(huggingface_hub.hf_hub_download(name, PLAN, revision=revision))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
            return None
    try:
        path = to_path(name) / PLAN
    except InputError:
        return None
    return path if name and path.is_file() else None


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_config(path: Path | str, *, revision: str | None = None) -> PreTrainedConfig:
    """Load a model's configuration; of its weights, only those that it calls tied are compared.

    Args:
        path: a folder, a hub id, a GGUF file, or ``builtin:NAME``.
        revision: branch, tag or commit of a hub model.

    Raises:
        ModelError: the model does not exist, or its configuration cannot be read.
    """
    import transformers

    source = _source(path, revision)
    if isinstance(source, Path):
        check_modeling_file(path, source)
    plain, read = transformers.PreTrainedConfig.get_config_dict, transformers.AutoConfig.from_pretrained
    settings: Any = _call(path, lambda: plain(str(source), revision=revision or "main")[0])
    try:
        # Before a model with too many layers is built.
        check_depth(settings)
    except ModelError as error:
        raise ModelError(f"model {path}: config.json: {error}") from error
    config: PreTrainedConfig = _call(
        path, lambda: read(str(source), revision=revision or "main", trust_remote_code=False)
    )
    _check_no_code(path, config)
    has_weights = isinstance(source, Path) and any((source / name).is_file() for name in (WEIGHTS, INDEX))
    if isinstance(source, Path) and has_weights and calls_tied(config):
        _check_files(path, source)
        try:
            untie_(config, Weights.of(_weight_files(path, source)))
        except ModelError as error:
            raise ModelError(f"model {path}: {error}") from error
    if has_weights and isinstance(source, Path) and config.dtype is None:
        config.dtype = _stored_type(_check_files(path, source))
    return config


def _stored_type(types: Mapping[str, str]) -> torch.dtype | None:
    """Return the type of the first floating-point tensor, as transformers takes it where config.json names none."""
    return next((STORED_FLOATS[name] for name in types.values() if name in STORED_FLOATS), None)


def _check_no_code(name: Path | str, config: PreTrainedConfig) -> None:
    """Refuse a configuration that makes transformers download code from the hub and run it."""
    for part in (config, config.get_text_config()):
        for key in ("_attn_implementation", "_experts_implementation"):
            chosen = getattr(part, key, None)
            if chosen is not None and "/" in str(chosen):
                raise ModelError(
                    f"model {name}: config.json names code on the hub ({key.strip('_')}: {chosen}); flapkit does not "
                    "run code that comes with a model; remove the entry"
                )


def check_language_model(name: Path | str, config: PreTrainedConfig) -> None:
    """Raise ``ModelError`` if a checkpoint holds a classifier, and no language model.

    Args:
        name: the model's name.
        config: its configuration.
    """
    named = getattr(config, "architectures", None)
    for architecture in named if isinstance(named, list) else ():
        kind = str(architecture).partition("For")[2]
        if f"AutoModelFor{kind}" in HEADS and f"AutoModelFor{kind}" != CAUSAL_LM:
            raise ModelError(
                f"model {name}: is a {architecture}, not a language model; load it with transformers' "
                f"AutoModelFor{kind}, and prune it in Python with flapkit.prune_ and flapkit.save"
            )


def load_tokenizer(path: Path | str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Args:
        path: a folder, a hub id, a GGUF file, or ``builtin:NAME``.
        revision: branch, tag or commit of a hub model.

    Raises:
        ModelError: the tokenizer does not exist, or cannot be read.
    """
    import transformers

    source = _source(path, revision)
    tokenizer: PreTrainedTokenizerBase = _call(
        path,
        lambda: transformers.AutoTokenizer.from_pretrained(
            str(source), revision=revision or "main", trust_remote_code=False
        ),
        what="tokenizer",
    )
    _check_token_ids(path, tokenizer)
    _check_templates(path, tokenizer.chat_template)
    return tokenizer


def processor_files(path: Path | str, *, revision: str | None = None) -> dict[str, bytes]:
    """Read the files of a vision-language model's processor beside its tokenizer; a pruned model keeps them.

    Args:
        path: a folder, or a hub id.
        revision: branch, tag or commit of a hub model.

    Returns:
        Name -> content of those that exist.
    """
    source = _source(path, revision)
    found = {name: _processor_file(path, source, name, revision) for name in PROCESSOR}
    return {name: file.read_bytes() for name, file in found.items() if file is not None}


def _processor_file(path: Path | str, source: Path | str, name: str, revision: str | None) -> Path | None:
    if isinstance(source, Path):
        return source / name if (source / name).is_file() else None
    try:
        return Path(_call(path, lambda: huggingface_hub.hf_hub_download(source, name, revision=revision)))
    except ModelError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise


def _check_token_ids(name: Path | str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse huge token ids: saving a tokenizer takes memory for every smaller id."""
    vocabulary: dict[str, int] = _call(name, tokenizer.get_vocab, what="tokenizer")
    token = max(vocabulary, key=vocabulary.__getitem__, default=None)
    if token is not None and vocabulary[token] >= MAX_TOKEN_ID:
        raise ModelError(f"tokenizer {name}: {token!r} has the id {vocabulary[token]}, expected under {MAX_TOKEN_ID}")


def _check_templates(name: Path | str, templates: Any) -> None:
    """Refuse chat templates that are not text, or whose names cannot be file names."""
    if templates is None:
        return
    for key, template in templates.items() if isinstance(templates, dict) else [("default", templates)]:
        if not key.isidentifier():
            raise ModelError(f"tokenizer {name}: {key!r} is not a valid name of a chat template")
        if not isinstance(template, str):
            raise ModelError(f"tokenizer {name}: a chat template is a {type(template).__name__}, expected text")


def open_weights(path: Path | str, *, revision: str | None = None) -> Weights:
    """Open a checkpoint's tensors, to read them one by one; tied tensors appear once.

    Args:
        path: a folder, a hub id, a GGUF file, or ``builtin:NAME``.
        revision: branch, tag or commit of a hub model.

    Raises:
        ModelError: the model is missing, damaged, pickled or quantised.
    """
    source = _source(path, revision)
    check_unquantised(path, load_config(path, revision=revision))
    if isinstance(source, str):
        hub = source
        source = Path(
            _call(path, lambda: str(huggingface_hub.snapshot_download(hub, revision=revision, allow_patterns=[*PARTS])))
        )
    _check_files(path, source)
    return Weights.of(_weight_files(path, source), str(path))


def _source(path: Path | str, revision: str | None = None) -> Path | str:
    """Resolve a model's name to an existing folder, or to a hub id; a GGUF file to the folder of its checkpoint."""
    name = str(path)
    if name.startswith(PREFIX):
        bundled = bundled_models()
        if name.removeprefix(PREFIX) not in bundled:
            known = [PREFIX + model for model in bundled]
            raise ModelError(f"model {name}: there is no such bundled model{did_you_mean(name, known)}")
        return bundled[name.removeprefix(PREFIX)]
    try:
        folder = to_path(path)
    except InputError as error:
        raise ModelError(f"model {name}: {error}") from error
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model {name}: the folder has no config.json; give the folder that has it")
        return folder
    if name.endswith(GGUF):
        return dequantised(folder if folder.is_file() else _download_gguf(path, folder, revision))
    if folder.exists():
        raise ModelError(
            f"model {name}: this is a file; give a {GGUF} file, or the folder of a Hugging Face checkpoint"
        )
    if isinstance(path, Path) or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(f"model {name}: folder not found: {folder.absolute()}")
    return name


def _download_gguf(path: Path | str, file: Path, revision: str | None) -> Path:
    """Download a GGUF file that is named by its hub id and its name there, as in ``owner/name/file.gguf``."""
    owner, _, rest = str(path).partition("/")
    repository, _, inside = rest.partition("/")
    if isinstance(path, Path) or file.is_absolute() or owner.startswith((".", "~")) or not owner or not inside:
        raise ModelError(f"model {path}: file not found: {file.absolute()}")
    return Path(
        _call(path, lambda: huggingface_hub.hf_hub_download(f"{owner}/{repository}", inside, revision=revision))
    )


def _check_files(name: Path | str, folder: Path) -> dict[str, str]:
    """Check that the weight files are readable, and return the data type of each tensor."""
    types: dict[str, str] = {}
    for file in _weight_files(name, folder):
        if not file.is_file():
            raise ModelError(f"model {name}: {file.name} is missing, but {INDEX} lists it")
        try:
            with safe_open(file, framework="pt") as tensors:
                types |= {param: tensors.get_slice(param).get_dtype() for param in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"model {name}: {file.name} is damaged or incomplete ({error}); download or write it again"
            ) from error
    return types


def _check_pruned(name: Path | str, folder: Path, config: PreTrainedConfig) -> None:
    """Check that tensors and plan fit the configuration."""
    check_shapes(name, config, _weight_files(name, folder))
    check_settings(name, config)
    if (folder / PLAN).is_file():
        read_plan(name, config, folder / PLAN)


def check_unpickled(name: Path | str) -> None:
    """Raise ``ModelError`` if a folder has weights, and all of them are pickled; a hub id is not looked at.

    Args:
        name: a folder, a hub id, or ``builtin:NAME``.
    """
    folder = _source(name)
    if not isinstance(folder, Path) or any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
        return
    if any(folder.glob("pytorch_model*.bin")):
        raise ModelError(
            f"model {name}: the weights are pickled, and flapkit reads only safetensors; convert them (this reads only "
            f"tensors, and runs no code of the file): {_conversion(str(folder), str(folder))}"
        )
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        raise ModelError(
            f"model {name}: the weights are pickled, and loading them can run code; convert them to safetensors"
        )


def _conversion(source: str, target: str) -> str:
    """Write the command that saves a model as safetensors, with its tokenizer if it goes to another folder."""
    classes = ["AutoModelForCausalLM", *(["AutoTokenizer"] if source != target else [])]
    options = {"AutoModelForCausalLM": ', dtype="auto"'}
    # Double quotes, as in JSON: a shell's single quotes stand around it all.
    loaded, saved = json.dumps(source), json.dumps(target)
    steps = [f"t.{of}.from_pretrained({loaded}{options.get(of, '')}).save_pretrained({saved})" for of in classes]
    return f"python -c {shlex.quote('; '.join(['import transformers as t', *steps]))}"


def _weight_files(name: Path | str, folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            shards = set(parse_json((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            return [to_path(within(folder, shard)) for shard in sorted(shards)]
        except (OSError, ValueError, LookupError, AttributeError, TypeError, InputError) as error:
            raise ModelError(f"model {name}: {INDEX} is damaged: {error}") from error
    check_unpickled(name)
    raise ModelError(f"model {name}: the folder has no weights ({WEIGHTS} or {INDEX})")


def _call(path: Path | str, loader: Callable[[], T], what: str = "model") -> T:
    try:
        return loader()
    except BaseException as error:
        # transformers can raise anything on a damaged checkpoint.
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        text = " ".join(str(error).split())
        if "cannot be loaded with `safetensors`" in text:
            command = _conversion(str(path), str(path).rpartition("/")[2])
            text = f"it has no weights in safetensors, which flapkit reads; convert those that it has: {command}"
        elif "trust_remote_code" in text:
            text = "it needs its own code, and flapkit does not run code that comes with a model"
        elif not isinstance(error, (OSError, ValueError)):
            text = f"{type(error).__name__}: {text}"
        raise ModelError(f"{what} {path}: cannot be loaded: {text}") from error
