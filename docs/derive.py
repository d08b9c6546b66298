"""Write docs/auto.md: what ``adapter: auto`` derives for model types that no plugin declares.

Run it as ``python docs/derive.py``.
"""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path

from flapkit.model.declaration import ExpertUnit, Family, with_experts
from flapkit.model.derive import derive, tiny_of
from flapkit.model.layout import sites_of
from flapkit.model.tiny import tiny_config
from flapkit.model.verify import verify
from flapkit.registry import ADAPTER, Registry
from flapkit.system.errors import FlapkitError

PAGE = Path(__file__).parent / "auto.md"

TYPES = (
    "apertus", "arcee", "biogpt", "cohere2", "ernie4_5", "exaone4", "glm", "glm4", "gpt_bigcode", "granitemoe", "jamba",
    "nemotron", "olmoe", "persimmon", "stablelm", "xglm", "bitnet", "codegen", "doge", "minimax", "mamba", "t5", "vit",
)  # fmt: skip
"""Model types that no plugin declares."""

HEAD = """# Undeclared models

What flapkit does with a model that no plugin declares. `adapter: auto` is the default: a model whose type a plugin
declares gets that plugin's adapter, and for every other model flapkit derives a declaration and verifies it, in a few
seconds and before any weights are read:

1. It builds a tiny random model of the same class and options. The decoder layers are the decoder's list of modules.
2. For each linear that writes to the residual stream it sets the columns of one unit to zero, and finds the rows
   whose gradient becomes exactly zero. These rows affect nothing but the unit, and are removed with it. The layout
   (`q`, `q+k+k`, ...) is the one that assigns these rows to the unit.
3. It reads from the module: size attributes, configuration entries that its forward uses, and arguments with a
   dimension of heads. Modules of stacked experts have flags for their layout; the router beside them is found by its
   `top_k` and its row for each expert.
4. It verifies the declaration: a sliced model must compute the same as the masked dense model, with two sequences,
   left padding, a step from the KV cache, and each attention implementation; and masking must change the logits.
5. After the model itself is loaded, one layer of each block is sliced and masked once more, at its real sizes, on a
   few tokens. In float32 the logits must agree to rounding. In half precision, where rounding is larger, they may
   differ by a quarter of the effect of masking, so only gross errors are found. Not every layer is checked.

`flapkit check` then prints `auto (derived and verified)` and lists the blocks; a block that is not listed is not
pruned: those with a convolution over the tokens (state-space layers), for example. The derived declaration is
recorded in `flapkit.json` and in the checkpoint's configuration.

A declaration that cannot be verified is refused: encoder-decoders, models without attention, parameters that several
layers share, and blocks that are not exact. The message says what failed, and prints the derived declaration as YAML;
correct it, save it, and list the file in [a recipe's `plugins`](interfaces/adapters.md). `flapkit check-adapter`
distinguishes forms of a model type that are refused from checks that failed: StableLM with norms of single heads is
refused.

## Tested model types

Tiny random models of types that no plugin declares (`python docs/derive.py`). They verify shapes and exactness, not
quality. The error is the largest difference of a logit between the sliced and the masked model, as a fraction of the
largest logit. In models with experts, the adapter's `expert_unit` chooses between `experts`, which lose channels,
`mixture`, which loses whole experts, and both.

| model type | outcome | blocks, or why not | error |
|---|---|---|---|"""


def row(model_type: str) -> str:
    """Derive a declaration, and return its row of the table."""
    try:
        config = tiny_config(model_type)
        family = derive(config)
        model = tiny_of(config)
        units: tuple[ExpertUnit, ...] = ("channel", "expert")
        mixed = any(block.kind == "mixture" for block in family.blocks)
        results = [verify(model, sites_of(model, with_experts(family, unit))) for unit in units[: 1 + mixed]]
        result = max(results, key=lambda result: result.error)
    except FlapkitError as error:
        reason = str(error).splitlines()[0].partition("cannot prune them: ")
        text = (reason[2] or reason[0]).partition("; see docs/")[0]
        return f"| {model_type} | refused | {text} | |"
    return f"| {model_type} | verified | {blocks(family)} | {result.error:.0e} ({', '.join(result.implementations)}) |"


def blocks(family: Family) -> str:
    """List the blocks of a declaration with their layouts."""
    parts = []
    for block in family.blocks:
        layouts = ", ".join(f"{name} `{layout}`" for name, layout in {**block.parameters, **block.outputs}.items())
        parts.append(f"{block.name}: {layouts}")
    return "; ".join(parts)


def main() -> None:
    """Write the page."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    known = Registry.load().names(ADAPTER)
    lines, begin = [HEAD], time.monotonic()
    for model_type in TYPES:
        config = tiny_config(model_type)
        assert not any(adapter.supports(config) for adapter in known.values()), f"{model_type} is declared"
        lines.append(row(model_type))
        print(lines[-1], flush=True)
    verified = sum("| verified |" in line for line in lines)
    lines += ["", f"{verified} of {len(TYPES)} verified, the others refused."]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{verified} of {len(TYPES)} verified, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
