from __future__ import annotations

import pytest
from flapkit_adapters.llama import Llama
from flapkit_adapters.vicuna import SYSTEM, Vicuna
from transformers import LlamaConfig, MistralConfig

from flapkit.system.errors import DataError


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_fastchats_two_separators() -> None:
    """A space after the system message and after the user, ``</s>`` and nothing else after the assistant."""
    text = Vicuna().render(
        [say("user", "Hello!"), say("assistant", "Hi!"), say("user", "How are you?"), say("assistant", "Well.")]
    )
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT: Well.</s>"
    )


def test_content_is_left_as_it_is() -> None:
    assert Vicuna().render([say("user", " a\n")]) == f"{SYSTEM} USER:  a\n "


def test_an_open_turn() -> None:
    assert Vicuna().render([say("user", "a"), say("assistant", "")]) == f"{SYSTEM} USER: a ASSISTANT:"


def test_a_system_message_takes_the_place_of_vicunas() -> None:
    assert Vicuna().render([say("system", "Be brief."), say("user", "a")]) == "Be brief. USER: a "


def test_a_system_message_in_the_middle() -> None:
    with pytest.raises(DataError, match="a system message only at the beginning"):
        Vicuna().render([say("user", "a"), say("system", "b")])


def test_rendering_leaves_the_conversation_alone() -> None:
    conversation = [say("system", "s"), say("user", "a")]
    Vicuna().render(conversation)
    assert conversation == [say("system", "s"), say("user", "a")]


@pytest.mark.parametrize(
    "path",
    [
        "lmsys/vicuna-7b-v1.5",
        "TheBloke/Wizard-Vicuna-13B",
        "/models/vicuna-7b",
        "/models/vicuna-7b/",
        "./Vicuna",
        "C:\\models\\vicuna-7b",
        "/cache/hub/models--lmsys--vicuna-7b-v1.5/snapshots/3321f76",
    ],
)
def test_its_name_is_a_checkpoints_mark(path: str) -> None:
    assert Vicuna.supports(LlamaConfig(name_or_path=path))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "meta-llama/Llama-2-7b-hf",
        "/home/me/vicuna-experiments/llama-7b",
        "vicuna-fans/llama-7b",
        "/cache/hub/models--vicuna-fans--llama/snapshots/3321f76",
    ],
)
def test_nothing_else_is(path: str) -> None:
    config = LlamaConfig(name_or_path=path)
    assert not Vicuna.supports(config)
    assert Llama.supports(config)


def test_another_architecture_of_that_name() -> None:
    assert not Vicuna.supports(MistralConfig(name_or_path="vicuna-7b"))


def test_its_sites_are_llamas() -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    assert Vicuna().sites(config) == Llama().sites(config)
