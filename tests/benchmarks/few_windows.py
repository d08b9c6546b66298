"""Compensators with few calibration windows: perplexity of text of the same and of another kind.

```
python tests/benchmarks/few_windows.py MODEL TEXT SAME OTHER [COMPENSATOR ...] [--windows 8 16 ...] [--ratio R]
```

MODEL is a checkpoint. Windows of 128 tokens are drawn from the first 3 million characters of TEXT, the smaller numbers
being the first of the largest. SAME and OTHER are texts to evaluate, 96 and 64 windows from their beginning. A
compensator is a name or a YAML section.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import flapkit
from flapkit.checkpoint.load import load, load_tokenizer
from flapkit.pruning.trials import perplexity_of, running

LENGTH, CHARACTERS = 128, 3_000_000
DEFAULT = ("bias", "least_squares", "procrustes", "{name: procrustes, ridge: 0.0}")


def tokens_of(tokenizer: PreTrainedTokenizerBase, path: str) -> Tensor:
    """Read and tokenise the beginning of a text."""
    return torch.tensor(tokenizer(Path(path).read_text(encoding="utf-8")[:CHARACTERS]).input_ids)


def drawn(tokens: Tensor, windows: int) -> Tensor:
    """Draw windows at random positions."""
    starts = torch.randint(0, len(tokens) - LENGTH, (windows,), generator=torch.Generator().manual_seed(0))
    return torch.stack([tokens[start : start + LENGTH] for start in starts])


def main(arguments: argparse.Namespace) -> None:
    """Print a row for every number of windows and every compensator."""
    tokenizer = load_tokenizer(arguments.model)
    calibration = drawn(tokens_of(tokenizer, arguments.text), max(arguments.windows))
    evaluations = [
        tokens_of(tokenizer, path)[: windows * LENGTH].view(windows, LENGTH)
        for path, windows in ((arguments.same, 96), (arguments.other, 64))
    ]

    def measured(model: PreTrainedModel) -> str:
        batches = [[{"input_ids": part} for part in windows.split(16)] for windows in evaluations]
        return "  ".join(f"{perplexity_of(running(model, text), text):.2f}" for text in batches)

    print(f"dense: {measured(load(arguments.model, 'float32'))}", flush=True)
    for windows in arguments.windows:
        for written in arguments.compensators or DEFAULT:
            compensator: Any = yaml.safe_load(written)
            model = load(arguments.model, "float32")
            flapkit.prune_(model, calibration[:windows], compensator=compensator, ratio=arguments.ratio)
            print(f"{windows} windows, {written}: {measured(model)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "text", "same", "other"):
        parser.add_argument(name)
    parser.add_argument("compensators", nargs="*", metavar="COMPENSATOR")
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--ratio", type=float, default=0.2)
    main(parser.parse_args())
