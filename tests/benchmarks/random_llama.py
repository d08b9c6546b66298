"""Write a random LLaMA of about 150 million parameters, and what 20 % and 50 % less leaves of it, to time with bench.

```
python tests/benchmarks/random_llama.py FOLDER [MULTIPLE]
flapkit bench FOLDER/pruned-20 --against FOLDER/dense
```
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from flapkit_searchers.al_am import ALAM
from transformers import LlamaConfig, LlamaForCausalLM

import flapkit

RATIOS = (0.2, 0.5)


def random_llama() -> LlamaForCausalLM:
    """Build the dense model: 12 layers of 12 heads, weights from a fixed seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2560,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def main(folder: Path, multiple_of: int = 64) -> None:
    """Write the dense model and the pruned ones."""
    dense = random_llama()
    dense.save_pretrained(folder / "dense")
    tokens = torch.randint(dense.config.vocab_size, (16, 64), generator=torch.Generator().manual_seed(1))
    for ratio in RATIOS:
        model = copy.deepcopy(dense)
        plan = flapkit.prune_(model, tokens, searcher=ALAM(multiple_of=multiple_of), ratio=ratio)
        flapkit.save(model, folder / f"pruned-{100 * ratio:.0f}", plan)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
