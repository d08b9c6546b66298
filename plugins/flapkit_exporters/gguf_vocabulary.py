"""Tokenizers in GGUF."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flapkit.interfaces import ModelError, tokenise
from flapkit_exporters.llama_cpp_quiet import load_llama_cpp

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_REST = _REST.replace(r"+[\r\n]*", r"+[\r\n/]*")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
SPLITS = {
    rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}\p{{N}}{_REST}": "qwen2",
    rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}{_TEKKEN_REST}": "tekken",
}
"""Regular expression of a pre-tokenizer -> llama.cpp's name of it."""

SAMPLES = (
    "Once upon a time, there was a little girl named Lily.",
    "  two  spaces,\n\nnew lines\tand tabs\n",
    "It's 1234567890 + 3.14; don't!",
    "Ünïcödé, 你好, привет 🙂",
    "def f(x):\n    return {'a': x ** 2}\n",
)
"""Texts for comparing both tokenizers."""

log = logging.getLogger("flapkit.exporters.gguf")


def add_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase | None, size: int, pre: str | None = None) -> None:
    """Write a tokenizer: SentencePiece's BPE, or byte-level BPE.

    Args:
        writer: a ``gguf.GGUFWriter``.
        tokenizer: the model's tokenizer, or None for a file that takes token ids only.
        size: rows of the embedding; rows that the tokenizer does not use become unused tokens.
        pre: llama.cpp's name of the pre-tokenizer of a byte-level BPE tokenizer.

    Raises:
        ModelError: llama.cpp has no such tokenizer.
    """
    if tokenizer is None:
        log.warning("export gguf: the checkpoint has no tokenizer; the file takes token ids only")
        writer.add_tokenizer_model("no_vocab")
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("export gguf: the tokenizer has no tokenizer.json; save it as a fast tokenizer first")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"export gguf: tokenizers of type {model['type']} are not supported, only SentencePiece BPE and BPE"
        )
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if model["byte_fallback"]:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_prefixes_space(data))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre or _pre_of(data))
        writer.add_token_merges([" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges])
    _add_tokens(writer, tokenizer, size)
    if model["byte_fallback"]:
        ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(merges)))}
        texts = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
        scores = [-float(ranks.get(text, len(ranks))) for text in texts]
        writer.add_token_scores(scores + [-float(len(ranks))] * (size - len(scores)))
    _add_special(writer, tokenizer)


def _add_tokens(writer: Any, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    import gguf

    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(size):
        text = texts.get(number, f"[PAD{number}]")
        kind = gguf.TokenType.NORMAL
        if number not in texts:
            kind = gguf.TokenType.UNUSED
        elif number == tokenizer.unk_token_id:
            kind = gguf.TokenType.UNKNOWN
        elif number in added:
            kind = gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
        elif len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = gguf.TokenType.BYTE
        tokens.append(text)
        kinds.append(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)


def _add_special(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    ends = list(tokenise(tokenizer, "a")["input_ids"])
    writer.add_add_bos_token(ends[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(ends[-1:] == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _prefixes_space(data: Any) -> bool:
    """Return whether the tokenizer adds a space before the text."""
    parts = [*_parts(data["normalizer"], "normalizers"), *_parts(data["pre_tokenizer"], "pretokenizers")]
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part["prepend_scheme"] != "never")
        for part in parts
    )


def _pre_of(data: Any) -> str:
    """Return llama.cpp's name of a byte-level BPE tokenizer's pre-tokenizer."""
    parts = _parts(data["pre_tokenizer"], "pretokenizers")
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and parts[0]["pattern"].get("Regex") in SPLITS:
        return SPLITS[parts[0]["pattern"]["Regex"]]
    raise ModelError(
        f"export gguf: unknown pre-tokenizer {kinds}; set the option `pre` to llama.cpp's name of it (see the list in "
        "llama.cpp's convert_hf_to_gguf.py)"
    )


def _parts(step: Any, name: str) -> list[Any]:
    """Return the steps of a tokenizer's sequence, or its single step."""
    if step is None:
        return []
    return list(step[name]) if step["type"] == "Sequence" else [step]


def compare_vocabulary(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn if llama.cpp tokenises a sample text differently from the tokenizer."""
    model = load_llama_cpp().Llama(str(path), vocab_only=True, verbose=False)
    try:
        for text in SAMPLES:
            expected = tokenise(tokenizer, text)["input_ids"]
            tokens = model.tokenize(text.encode(), add_bos=True, special=False)
            if list(tokens) != list(expected):
                log.warning("export gguf: llama.cpp tokenises %r as %s, the tokenizer as %s", text, tokens, expected)
    finally:
        model.close()
