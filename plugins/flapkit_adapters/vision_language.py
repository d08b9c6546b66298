"""Vision-language models: the language model is pruned, and the vision tower stays."""

from __future__ import annotations

from flapkit.interfaces import Family
from flapkit_adapters.llama import ATTENTION, MLP

VISION_LANGUAGE = tuple(
    Family(model_type, (model_type,), f"model.{path}.layers", (ATTENTION, MLP), about)
    for model_type, path, about in (
        ("gemma3", "language_model", "Gemma 3; its vision tower is not pruned."),
        ("idefics3", "text_model", "Idefics 3; its vision tower is not pruned."),
        ("llava", "language_model", "LLaVA; its vision tower is not pruned."),
        ("qwen2_5_vl", "language_model", "Qwen 2.5 VL; its vision tower is not pruned."),
        ("smolvlm", "text_model", "SmolVLM; its vision tower is not pruned."),
    )
)
