"""Conversations as calibration text: their two common forms, and how they become text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flapkit.system.errors import DataError, did_you_mean

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
