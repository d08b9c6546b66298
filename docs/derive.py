"""Write docs/auto.md: what ``adapter: auto`` makes of model types that no plugin declares.

Run it as ``python docs/derive.py``.
"""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path

from flapkit.model.declaration import Family
from flapkit.model.derive import derive, tiny_of
from flapkit.model.layout import sites_of
from flapkit.model.tiny import tiny_config
from flapkit.model.verify import verify
from flapkit.registry import Registry
from flapkit.system.errors import FlapkitError

PAGE = Path(__file__).parent / "auto.md"

TYPES = (
    "apertus", "arcee", "biogpt", "cohere2", "ernie4_5", "exaone4", "glm", "glm4", "gpt_bigcode", "granitemoe", "jamba",
    "olmoe", "persimmon", "stablelm", "xglm", "bitnet", "codegen", "doge", "minimax", "mamba", "t5", "vit",
)  # fmt: skip
"""Model types that no plugin declares."""

HEAD = """# Models that nobody declared

`adapter: auto` is the default. A model whose type a plugin declares gets that plugin's adapter. For every other one,
flapkit derives the declaration and proves it, in a few seconds and before any weights are read:

1. It builds a tiny random model of the same class and options. The decoder layers are the decoder's list of modules.
2. For each linear that writes to the residual stream it zeroes the columns that read one unit, and asks which rows'
   gradients become exactly zero. Those rows feed nothing else: they go with the unit. The layout (`q`, `q+k+k`, ...) is
   the one by which the rows that died are the unit's.
3. Counts that the module keeps, names that its forward reads from the configuration, and arguments with a dimension of
   heads are read off the module. Stacked experts say themselves how they are laid out.
4. The declaration has to keep the law: a sliced model computes what the masked dense model computes, with two
   sequences, left padding, a cached step, and each attention implementation, and masking must have moved the logits.
5. When the model itself is loaded, one layer's share of each block is sliced and masked once more, at its real sizes,
   on a few tokens. In float32 the logits have to agree to rounding. In half precision, where rounding is larger, they
   may differ by a quarter of what masking moves them: that catches only what is grossly wrong. It does not look at
   every layer.

`flapkit check` then says `auto (derived and proven)` and lists the blocks; a block that is not listed is not pruned.
The derived declaration is recorded in `flapkit.json` and in the checkpoint's configuration.

Whatever cannot be proven is refused: an encoder-decoder or a model without attention by name, parameters that several
layers share, and blocks that are not exact. The message says what failed, and prints what was derived as the YAML file
that [a recipe's `plugins`](interfaces/adapters.md) can name once it is corrected.

## What was tried

Tiny random models of types that no plugin declares (`python docs/derive.py`). They prove shapes and the law, not
quality. The error is the largest difference of a logit between sliced and masked, as a fraction of the largest logit.

| model type | outcome | blocks, or why not | error |
|---|---|---|---|"""


def row(model_type: str) -> str:
    """Derive a declaration, and say how it went."""
    try:
        config = tiny_config(model_type)
        family = derive(config)
        model = tiny_of(config)
        proof = verify(model, sites_of(model, family))
    except FlapkitError as error:
        reason = str(error).splitlines()[0].partition("cannot prune them: ")
        said = (reason[2] or reason[0]).partition("; docs/")[0]
        return f"| {model_type} | refused | {said} | |"
    return f"| {model_type} | proven | {blocks(family)} | {proof.error:.0e} ({', '.join(proof.implementations)}) |"


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
    known = Registry.load().names("adapter")
    lines, begin = [HEAD], time.monotonic()
    for model_type in TYPES:
        config = tiny_config(model_type)
        assert not any(each.supports(config) for each in known.values()), f"{model_type} is declared"
        lines.append(row(model_type))
        print(lines[-1], flush=True)
    proven = sum("| proven |" in line for line in lines)
    lines += ["", f"{proven} of {len(TYPES)} proven, the others refused."]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{proven} of {len(TYPES)} proven, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
