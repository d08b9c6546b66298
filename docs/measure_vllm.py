"""Measure perplexity in vLLM: ``python docs/measure_vllm.py --text FILE --tokenizer MODEL FOLDER ...``.

It runs in the environment of ``make test-serve``, on the windows of ``docs/measure_quantised.py``, and uses the
log-probabilities that vLLM gives for the tokens of a prompt.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from vllm import LLM, SamplingParams

from flapkit.checkpoint.load import load_tokenizer

CACHE = 200_000_000
"""Bytes of the KV cache; by default, vLLM takes nearly all memory."""


def perplexity(folder: str, windows: list[list[int]]) -> float:
    """Return the perplexity of windows of tokens in a checkpoint."""
    model = LLM(
        folder,
        dtype="float32",
        trust_remote_code=True,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=len(windows[0]) + 1,
        max_num_seqs=4,
        kv_cache_memory_bytes=CACHE,
    )
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = model.generate([{"prompt_token_ids": window} for window in windows], asked)
    losses = [
        -told[token].logprob
        for answer, window in zip(answers, windows, strict=True)
        for token, told in zip(window[1:], answer.prompt_logprobs[1:], strict=True)
    ]
    return math.exp(math.fsum(losses) / len(losses))


def main() -> None:
    """Print a line for each folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--text", type=Path, required=True, help="text to measure perplexity on")
    parser.add_argument("--tokenizer", required=True, help="the dense model")
    parser.add_argument("--windows", type=int, default=20, help="windows of it")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    given = parser.parse_args()
    tokens = load_tokenizer(given.tokenizer)(given.text.read_text(encoding="utf-8")[:200_000])["input_ids"]
    windows = [tokens[at * given.length : (at + 1) * given.length] for at in range(given.windows)]
    for folder in given.folders:
        print(f"{folder}: perplexity {perplexity(folder, windows):.3f}", flush=True)


if __name__ == "__main__":
    main()
