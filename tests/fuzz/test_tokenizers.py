"""A tokenizer that somebody changed: it turns text into tokens, or is refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from flapkit_exporters.gguf_vocabulary import add_vocabulary
from fuzzing import DAMAGE, VALUES, cases, damaged, put_back, read, tampered
from hypothesis import example, given
from hypothesis import strategies as st

from flapkit.checkpoint.bundled import bundled_models
from flapkit.checkpoint.load import load_tokenizer
from flapkit.run.text import renderer
from flapkit.system.errors import DataError, ModelError
from flapkit.text.windows import encode

SPLIT = {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
START = {"SpecialToken": {"id": "<s>", "type_id": 0}}
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}
TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
BASE: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [{"id": 0, "content": "<s>", **TOKEN}, {"id": 1, "content": "</s>", **TOKEN}],
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [START, SEQUENCE],
        "pair": [START, SEQUENCE, SEQUENCE],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
}
VOCABULARY = {token: number for number, token in enumerate(["<s>", "</s>", "a", "b", "ab", "<0x61>", "_"])}
MODELS: dict[str, Any] = {
    "BPE": {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<s>",
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": VOCABULARY,
        "merges": [["a", "b"]],
    },
    "Unigram": {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<s>", 0.0], ["a", -1.5], ["ab", -2.5]],
        "byte_fallback": False,
    },
    "WordPiece": {
        "type": "WordPiece",
        "unk_token": "<s>",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": VOCABULARY,
    },
    "WordLevel": {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "<s>"},
}
SETTINGS: dict[str, Any] = {
    "backend": "tokenizers",
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "__type": "AddedToken", **TOKEN},
    "pad_token": "</s>",
    "unk_token": None,
    "add_bos_token": True,
    "added_tokens_decoder": {"0": {"content": "<s>", **TOKEN}, "1": {"content": "</s>", **TOKEN}},
    "additional_special_tokens": ["<x>"],
    "extra_special_tokens": {"image_token": "<y>"},
    "model_max_length": 2048,
    "padding_side": "right",
    "clean_up_tokenization_spaces": False,
    "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
    "tokenizer_class": "TokenizersBackend",
}
CLASSES = st.sampled_from(["LlamaTokenizer", "GPT2TokenizerFast", "BertTokenizer", "T5Tokenizer", "Nobody", "auto"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tokenizer of a tiny vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizers") / "model"
    folder.mkdir()
    shutil.copy(bundled_models()["tiny-llama"] / "config.json", folder)
    (folder / "tokenizer.json").write_text(json.dumps({**BASE, "model": MODELS["BPE"]}))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    return folder


def test_tokens_of_huge_numbers_are_refused(folder):
    """Where such a tokenizer is saved, tokenizers takes memory for every number below, and ends the process."""
    model = {"type": "WordLevel", "vocab": {**VOCABULARY, "a": 10**9}, "unk_token": "<s>"}
    with (
        put_back(folder / "tokenizer.json", json.dumps({**BASE, "model": model})),
        pytest.raises(ModelError, match="'a' has the id 1000000000, expected under"),
    ):
        load_tokenizer(folder)


def examine(folder: Path, name: str, content: str | bytes) -> None:
    """Read a tokenizer one of whose files is something else, and use it as a run does."""
    with put_back(folder / name, content):
        tokenizer = read(lambda: load_tokenizer(folder), str(folder))
        if tokenizer is None:
            return
        render = renderer(None, tokenizer)
        tokenizer.save_pretrained(folder.parent / "saved")
        text = "ab <s>ba é"
        if render is not None:
            text += read(lambda: render([{"role": "user", "content": "ab"}]), "template") or ""
        read(lambda: encode(tokenizer, [text, "b"], " ", vocab_size=7), "tokenizer")


@pytest.mark.parametrize("model", MODELS)
def test_a_tokenizer_that_was_changed(folder, model):
    known = {**BASE, "model": MODELS[model]}
    vocabulary = known["model"]["vocab"]

    @cases(140)
    @given(tampered(known))
    @example({**known, "post_processor": {**BASE["post_processor"], "special_tokens": {}}})
    @example({**known, "model": {**known["model"], "vocab": [*vocabulary][1:], "unk_token": "<x>"}})
    @example({**known, "model": {"type": "WordLevel", "vocab": {**VOCABULARY, "a": 10**9}, "unk_token": "<s>"}})
    @example({**known, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<s>"}})
    def check(tree):
        examine(folder, "tokenizer.json", json.dumps(tree))

    check()


@cases(280)
@given(tampered(SETTINGS, CLASSES | VALUES))
@example({**SETTINGS, "model_max_length": "2048"})
@example({**SETTINGS, "chat_template": ["x"]})
@example({**SETTINGS, "chat_template": {"a": None}})
@example({**SETTINGS, "auto_map": {"AutoTokenizer": ["trap.T", None]}, "tokenizer_class": "Trap"})
def test_settings_that_were_changed(folder, tree):
    examine(folder, "tokenizer_config.json", json.dumps(tree))


@pytest.mark.parametrize("pre", ["gpt-2", None])
def test_a_tokenizer_that_was_changed_as_gguf_has_it(folder, pre):
    pytest.importorskip("gguf")
    known = {**BASE, "model": MODELS["BPE"]}

    @cases(60)
    @given(tampered(known))
    @example({**known, "added_tokens": [], "model": {**known["model"], "vocab": {}, "merges": [], "unk_token": None}})
    @example({**known, "post_processor": {**BASE["post_processor"], "special_tokens": {}}})
    def check(tree):
        (folder / "tokenizer.json").write_text(json.dumps(tree))
        tokenizer = read(lambda: load_tokenizer(folder), str(folder))
        if tokenizer is not None:
            read(lambda: add_vocabulary(MagicMock(), tokenizer, 10, pre))

    with put_back(folder / "tokenizer.json"):
        check()


SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>", **TOKEN}, "additional_special_tokens": ["<x>"]}


@cases(80)
@given(st.sampled_from(["special_tokens_map.json", "added_tokens.json"]), tampered({**SPECIAL, "<y>": 7}))
def test_special_tokens_that_were_changed(folder, name, tree):
    examine(folder, name, json.dumps(tree))


PIECES = "{{ ¦{% ¦}} ¦%} ¦messages ¦for m in messages ¦endfor ¦set x = ¦m.content ¦m['role'] ¦| tojson ¦{# ¦#} ¦\0"
PIECES += "¦x.__class__ ¦range(9) ¦raise_exception('no') ¦strftime_now('%Y') ¦self ¦cycler.__init__ ¦* 10**7 ¦'a' "


@cases(80)
@given(st.lists(st.sampled_from(PIECES.split("¦")), max_size=10).map("".join) | st.text(max_size=20))
def test_a_chat_template_of_pieces(folder, template):
    examine(folder, "chat_template.jinja", template)


@cases(80)
@given(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), DAMAGE)
def test_bytes_that_were_changed(folder, name, damage):
    examine(folder, name, damaged((folder / name).read_bytes(), damage))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b"[]", b"null", b'"' + b"\\ud800" + b'"', b"{}"])
def test_what_is_no_tokenizer(folder, name, content):
    examine(folder, name, content)


def test_every_model_encodes_as_it_is(folder):
    """The cases begin with tokenizers that work."""
    for model in MODELS.values():
        (folder / "tokenizer.json").write_text(json.dumps({**BASE, "model": model}))
        assert len(encode(load_tokenizer(folder), ["ab"], " "))
        with pytest.raises(DataError):
            encode(load_tokenizer(folder), ["ab"], " ", vocab_size=0)
