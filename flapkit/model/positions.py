"""How long a text a model can take: checked against its configuration before anything runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from flapkit.model.registration import dense_type
from flapkit.system.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

BUFFERS = ("embed_positions", "pos_encoding")
"""Names of buffers that hold a row for each position, [positions, features]: GPT-J, CodeGen, CTRL."""

STRETCHED = ("linear", "dynamic", "yarn")
"""Kinds of rotary scaling that make the context longer by ``factor``."""

log = logging.getLogger(__name__)


def check_lengths(model: PreTrainedModel, lengths: Mapping[str, int]) -> None:
    """Refuse sequences that a model has no positions for, and warn of those that are longer than it was made for.

    Args:
        model: the model; one without memory (``flapkit.model.empty.skeleton``) will do.
        lengths: what has the length, as in ``calibration.length`` -> tokens of a sequence.

    Raises:
        InputError: the model looks positions up in a table, and a sequence is longer than the table.
    """
    table, context = table_length(model), context_length(model.config)
    name = str(model.config.name_or_path or type(model).__name__)
    for what, length in lengths.items():
        if table is not None and length > table:
            raise InputError(f"{what}: {length} tokens, but {name} has positions for {table} only; use {table} or less")
        if context is not None and length > context:
            log.warning(
                "%s: %d tokens, but the model was made for %d (max_position_embeddings); beyond them its output may be "
                "poor",
                what,
                length,
                context,
            )


def table_length(model: PreTrainedModel) -> int | None:
    """Return the number of positions that a model has a table for; None if it computes positions of any number."""
    config = model.config.get_text_config()
    if dense_type(config.model_type) == "mpt":
        # Its ALiBi biases are built for so many positions.
        return int(config.max_seq_len)
    return min(_tables(model), default=None)


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that a model was made for, rotary scaling included; None if nothing says."""
    text: Any = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not isinstance(context, int) or context < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    factor = rope.get("factor") if rope.get("rope_type") in STRETCHED else None
    return max(context, int((rope.get("original_max_position_embeddings") or context) * (factor or 1)))


def _tables(model: PreTrainedModel) -> Iterator[int]:
    """Yield the lengths of the text model's tables of positions."""
    from transformers import PreTrainedModel

    types = {model.config.model_type, model.config.get_text_config().model_type}
    modules = dict(model.named_modules())
    # Encoders of images and sounds have positions of their own.
    others = tuple(
        f"{name}."
        for name, module in modules.items()
        if isinstance(module, PreTrainedModel) and module.config.model_type not in types
    )
    for name, module in modules.items():
        if name.startswith(others):
            continue
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in leaf or leaf == "wpe"):
            # RoBERTa and its kin count positions from behind the padding token's number.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            yield module.num_embeddings - int(getattr(module, "offset", unused))
        buffers: Iterator[tuple[str, Tensor]] = module.named_buffers(recurse=False)
        yield from (buffer.shape[0] for name, buffer in buffers if name in BUFFERS)
