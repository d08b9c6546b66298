"""Runs a model in vLLM, in a process of its own that has not imported flapkit.

There vLLM takes a pruned model's classes from its folder, as it does wherever it is served; flapkit's own would be
others. ``flapkit.run.engines`` starts this file with its settings as JSON, writes a line for every turn, and reads a
line of JSON with the turn's seconds; the first line has vLLM's version.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

MARK = "FLAPKIT "
"""Begins the lines that are answers: vLLM writes others."""


def main() -> None:
    """Load the model, and run it once for each line of stdin."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    import vllm

    model = vllm.LLM(**settings["model"])
    prompts = [{"prompt_token_ids": prompt} for prompt in settings["prompts"]]
    first, whole = (
        vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        for count in (1, settings["tokens"] + 1)
    )
    _answer(vllm.__version__)
    for _ in sys.stdin:
        seconds = []
        for sampling in (first, whole):
            start = time.perf_counter()
            model.generate(prompts, sampling, use_tqdm=False)
            seconds.append(time.perf_counter() - start)
        _answer(seconds)


def _answer(what: object) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(what)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
