"""Conversations as calibration text: read the two common formats."""

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
"""A dataset's name of a speaker -> the role."""


def is_conversation(value: Any) -> bool:
    """Return whether a field is a list of messages rather than text."""
    return isinstance(value, list) and all(isinstance(message, Mapping) for message in value)


def normalise(messages: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, str]]:
    """Convert ``messages`` (role, content) or ShareGPT's ``conversations`` (from, value) to one format.

    Other keys of a message are ignored.

    Args:
        messages: the messages of one row.
        where: the row's name in error messages.

    Returns:
        The same messages with the keys ``role`` and ``content``.

    Raises:
        DataError: a message has another format, or an unknown speaker.
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
                f"{where}: message {number}: expected text in `role` and `content`, or in `from` and `value`; "
                f"found the keys {', '.join(map(str, message)) or 'none'}"
            )
        if speaker not in ROLES:
            raise DataError(f"{where}: message {number}: unknown speaker {speaker!r}{did_you_mean(speaker, ROLES)}")
        conversation.append({"role": ROLES[speaker], "content": content})
    return conversation
