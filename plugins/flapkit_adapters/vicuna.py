"""Vicuna: a LLaMA that is talked to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from flapkit_adapters.llama import Llama

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Vicuna(Llama):
    """Vicuna: LLaMA's sites, and calibration conversations in its v1.1 prompt format."""

    name = "vicuna"

    @classmethod
    def supports(cls, config: PreTrainedConfig) -> bool:
        """Tell whether the configuration is a LLaMA's whose checkpoint calls itself Vicuna."""
        return super().supports(config) and "vicuna" in str(config.name_or_path).lower()

    def render(self, conversation: Sequence[Mapping[str, str]]) -> str:
        """Render messages as ``SYSTEM USER: ... ASSISTANT: ...</s>`` (FastChat's vicuna_v1.1)."""
        system = SYSTEM
        text = ""
        for message in conversation:
            content = message["content"].strip()
            if message["role"] == "system":
                system = content
            elif message["role"] == "user":
                text += f" USER: {content}"
            else:
                text += f" ASSISTANT: {content}</s>"
        return system + text
