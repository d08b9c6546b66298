"""Vicuna: LLaMA trained on conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from flapkit.interfaces import DataError
from flapkit_adapters.llama import Llama

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SPEAKERS: Mapping[str, tuple[str, str]] = {"user": ("USER", " "), "assistant": ("ASSISTANT", "</s>")}
"""Role -> the speaker's name in the prompt, and the end of a message."""


@dataclass(frozen=True)
class Vicuna(Llama):
    """Vicuna: LLaMA's sites, and calibration conversations in its v1.1 prompt format.

    Vicuna's configuration is LLaMA's, so a checkpoint is recognised by its name only: the name of the hub repository
    (without its owner), or of the folder itself, must contain "vicuna". For other names, set ``adapter: vicuna``.
    """

    name = "vicuna"

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Return whether it is a LLaMA configuration and the checkpoint's name contains "vicuna"."""
        return super().supports(config) and "vicuna" in _checkpoint_name(str(config.name_or_path or "")).lower()

    def render(self, conversation: Sequence[Mapping[str, str]]) -> str:
        """Render messages as ``SYSTEM USER: ... ASSISTANT: ...</s>USER: ...`` (FastChat's vicuna_v1.1).

        A system message at the beginning replaces Vicuna's own. A message without content is an open turn, from which
        generation starts: the speaker's name and a colon.

        Args:
            conversation: messages with ``role`` and ``content``.

        Raises:
            DataError: a system message that is not the first.
        """
        system, messages = SYSTEM, list(conversation)
        if messages and messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
        text = f"{system} "
        for message in messages:
            if message["role"] not in SPEAKERS:
                raise DataError(f"Vicuna's format allows a {message['role']} message only at the beginning")
            speaker, end = SPEAKERS[message["role"]]
            text += f"{speaker}: {message['content']}{end}" if message["content"] else f"{speaker}:"
        return text


def _checkpoint_name(path: str) -> str:
    """Return the name of a hub repository, a local folder, or the repository of a cached snapshot."""
    parts = PurePath(path.replace("\\", "/")).parts
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    return next(iter(cached or parts[-1:]), "")
