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
from transformers import LlamaConfig, LlamaForCausalLM

import flapkit
from flapkit.checkpoint.bundled import bundled_models

RATIOS = (0.2, 0.5)
RECIPE = {
    "model": {"path": "dense"},
    "calibration": {"dataset": "stdlib"},
    "budget": {"ratio": 0.2},
    "evaluate": {"perplexity": [{"dataset": "stdlib", "length": 64, "windows": 8, "batch_size": 4}]},
}
"""The recipe by which benchmarks run such a model, in ``dense``."""


def random_llama(
    layers: int = 12, width: int = 768, mlp: int = 2560, heads: int = 12, vocabulary: int = 32000
) -> LlamaForCausalLM:
    """Build a dense model, weights from a fixed seed; of 148 million parameters if nothing else is asked for."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def add_tokenizer(folder: Path) -> None:
    """Put the bundled model's tokenizer beside a model."""
    for file in bundled_models()["tiny-llama"].glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())


def main(folder: Path, multiple_of: int = 64) -> None:
    """Write the dense model and the pruned ones."""
    dense = random_llama()
    dense.save_pretrained(folder / "dense")
    tokens = torch.randint(dense.config.vocab_size, (16, 64), generator=torch.Generator().manual_seed(1))
    for ratio in RATIOS:
        model = copy.deepcopy(dense)
        plan = flapkit.prune_(model, tokens, ratio=ratio, options=flapkit.PruneOptions(multiple_of=multiple_of))
        flapkit.save(model, folder / f"pruned-{100 * ratio:.0f}", plan)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
