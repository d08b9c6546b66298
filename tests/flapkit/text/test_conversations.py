from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from flapkit.registry import ADAPTER, Registry
from flapkit.run.text import renderer
from flapkit.system.errors import DataError
from flapkit.text.conversations import is_conversation, normalise

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
]
SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "hi", "markdown": None},
    {"from": "gpt", "value": "hello"},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)


def tokenizer(template: str | None = None, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token=bos)
    made.chat_template = template
    return made


def adapter(name: str) -> Any:
    return Registry.load().create(ADAPTER, name)


def test_both_forms_become_one() -> None:
    assert normalise(MESSAGES, "row 0") == normalise(SHAREGPT, "row 0") == MESSAGES
    assert normalise([], "row 0") == []


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "usr", "content": "x"}, "unknown speaker 'usr'; did you mean 'user'?"),
        ({"from": "bing", "value": "x"}, "unknown speaker 'bing'"),
        ({"role": "user"}, "found the keys role"),
        ({"role": "user", "value": "x"}, "found the keys role, value"),
        ({"role": "user", "content": None}, "expected text in `role` and `content`, or in `from` and `value`"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "expected text in"),
        ({"role": 1, "content": "x"}, "expected text in"),
        ({}, "found the keys none"),
    ],
)
def test_a_message_of_another_form_is_named(message: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as error:
        normalise([*MESSAGES, message], "chat.jsonl:7")
    assert str(error.value).startswith("chat.jsonl:7: message 3: ")
    assert problem in str(error.value)


def test_what_a_conversation_is() -> None:
    assert is_conversation(MESSAGES)
    assert is_conversation([])
    assert not is_conversation("text")
    assert not is_conversation(["text"])
    assert not is_conversation({"role": "user"})


def test_the_tokenizers_template() -> None:
    for chosen in (None, adapter("llama")):
        render = renderer(chosen, tokenizer(TEMPLATE))
        assert render is not None
        assert render(MESSAGES) == "<s><system>Be kind.<user>hi<assistant>hello"


def test_a_template_that_refuses() -> None:
    render = renderer(None, tokenizer(TEMPLATE))
    assert render is not None
    with pytest.raises(DataError, match=r"chat template fails on it: .*system comes first"):
        render([MESSAGES[1], MESSAGES[0]])


def test_nothing_renders() -> None:
    assert renderer(None, tokenizer()) is None
    assert renderer(adapter("llama"), tokenizer()) is None


def test_the_adapter_comes_before_the_template() -> None:
    render = renderer(adapter("vicuna"), tokenizer(TEMPLATE))
    assert render is not None
    assert render(MESSAGES) == "<s>Be kind. USER: hi ASSISTANT: hello</s>"


def test_a_tokenizer_without_a_start_token() -> None:
    render = renderer(adapter("vicuna"), tokenizer(bos=None))
    assert render is not None
    assert render(MESSAGES).startswith("Be kind. ")


def test_an_adapter_may_leave_a_conversation_to_the_template() -> None:
    @dataclass(frozen=True)
    class Undecided(type(adapter("llama"))):  # type: ignore[misc]
        name = "undecided"

        def render(self, conversation: Any) -> str | None:
            return "<s>short" if len(conversation) == 1 else None

    render = renderer(Undecided(), tokenizer())
    assert render is not None
    assert render(MESSAGES[:1]) == "<s>short"
    with pytest.raises(DataError, match="has no format for conversations"):
        render(MESSAGES)
    with_template = renderer(Undecided(), tokenizer(TEMPLATE))
    assert with_template is not None
    assert with_template(MESSAGES).startswith("<s><system>")
