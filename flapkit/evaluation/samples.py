"""Text that a model writes, to read beside another's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from flapkit.text.tokenise import tokenise


@torch.no_grad()
def write_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Continue prompts, one at a time.

    Args:
        model: where it is, in evaluation mode.
        tokenizer: the model's.
        prompts: plain text.
        tokens: tokens to write, fewer where the model ends its text itself.
        temperature: 0 for the likeliest token each time, else what the logits are divided by before one is drawn.
        seed: seed of the drawing; the generators of the caller stay as they were.

    Yields:
        The continuation of each prompt, without the prompt.
    """
    device = next(model.get_input_embeddings().parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Not the model's own generation settings: they may sample, and the two models are to differ in nothing else.
    chosen = GenerationConfig(
        max_new_tokens=tokens,
        do_sample=temperature > 0,
        pad_token_id=pad,
        eos_token_id=model.generation_config.eos_token_id if model.generation_config else tokenizer.eos_token_id,
        **({"temperature": temperature, "top_k": 0} if temperature > 0 else {}),
    )
    for prompt in prompts:
        inputs = tokenise(tokenizer, prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            generate: Any = model.generate
            written = generate(**inputs, generation_config=chosen)[0, inputs["input_ids"].shape[1] :]
        yield str(tokenizer.decode(written, skip_special_tokens=True))
