"""Conversations as calibration text: their two common forms, and how they become text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from flapkit.errors import DataError, did_you_mean
from flapkit.interfaces import ArchitectureAdapter

Conversation = Sequence[Mapping[str, str]]
"""Messages with ``role`` (``system``, ``user``, ``assistant``) and ``content``."""

ROLES: Mapping[str, str] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""What datasets call a speaker -> the role."""


def is_conversation(value: Any) -> bool:
    """Tell whether a field holds messages rather than text."""
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def normalise(messages: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, str]]:
    """Bring ``messages`` (role, content) and ShareGPT's ``conversations`` (from, value) into one form.

    Other keys of a message are a dataset's own notes, and no part of the conversation.

    Args:
        messages: the messages of one row.
        where: how an error names the row.

    Returns:
        The same messages with the keys ``role`` and ``content``.

    Raises:
        DataError: a message of another form, or an unknown speaker.
    """
    conversation = []
    for number, message in enumerate(messages):
        speaker, content = (
            (message.get("role"), message.get("content"))
            if "role" in message
            else (message.get("from"), message.get("value"))
        )
        if not isinstance(speaker, str) or not isinstance(content, str):
            raise DataError(
                f"{where}: message {number}: expected the texts `role` and `content`, or `from` and `value`; "
                f"found the keys {', '.join(map(str, message)) or 'none'}"
            )
        if speaker not in ROLES:
            raise DataError(f"{where}: message {number}: unknown speaker {speaker!r}{did_you_mean(speaker, ROLES)}")
        conversation.append({"role": ROLES[speaker], "content": content})
    return conversation


def renderer(
    adapter: ArchitectureAdapter | None, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Conversation], str] | None:
    """Choose how conversations become text: by the adapter, or else by the tokenizer's chat template.

    A rendered conversation begins with the tokenizer's start token, if it has one, as in training.

    Args:
        adapter: the model's adapter, whose ``render`` comes first.
        tokenizer: the model's tokenizer.

    Returns:
        A function that raises ``DataError`` for a conversation that the format does not allow, or None where neither
        the adapter nor the tokenizer has a format.
    """
    adapted = adapter is not None and type(adapter).render is not ArchitectureAdapter.render
    if not adapted and not tokenizer.chat_template:
        return None

    def render(conversation: Conversation) -> str:
        text = adapter.render(conversation) if adapter else None
        if text is not None:
            start = tokenizer.bos_token or ""
            return text if text.startswith(start) else start + text
        return _by_template(tokenizer, conversation)

    return render


def _by_template(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    if not tokenizer.chat_template:
        raise DataError("the adapter does not render this conversation, and the tokenizer has no chat template")
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in conversation], tokenize=False))
    except Exception as error:
        raise DataError(f"the tokenizer's chat template refuses it: {type(error).__name__}: {error}") from error
