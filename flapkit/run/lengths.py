"""The lengths of all sequences that a recipe runs through its model, for ``flapkit.model.positions.check_lengths``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flapkit.pruning.recovery import Training
from flapkit.recipe.schema import Evaluate, Recipe
from flapkit.run.text import render_prompts
from flapkit.text.tokenise import tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from flapkit.model.adapter import ArchitectureAdapter


def run_lengths(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, adapter: ArchitectureAdapter | None
) -> dict[str, int]:
    """Return the tokens of each sequence that is pruned by or measured: key of the recipe -> tokens."""
    return {"calibration.length": recipe.calibration.length, **evaluation_lengths(recipe.evaluate, tokenizer, adapter)}


def evaluation_lengths(
    settings: Evaluate, tokenizer: PreTrainedTokenizerBase | None, adapter: ArchitectureAdapter | None
) -> dict[str, int]:
    """Return the tokens of each sequence that is measured: windows, and prompts with what is generated after them.

    Args:
        settings: what is measured.
        tokenizer: the model's; None where no samples are generated.
        adapter: the model's, for prompts that are conversations.
    """
    lengths = {f"evaluate.perplexity[{number}].length": text.length for number, text in enumerate(settings.perplexity)}
    if settings.samples is None or tokenizer is None:
        return lengths
    # The last token is generated, but not read.
    generated = settings.samples.tokens - 1
    return lengths | {
        f"evaluate.samples.prompts[{number}] and `tokens`": len(tokenise(tokenizer, prompt)["input_ids"]) + generated
        for number, prompt in enumerate(render_prompts(settings.samples, adapter, tokenizer))
    }


def recovery_length(training: Training) -> dict[str, int]:
    """Return the tokens of a window that is trained on."""
    return {"compensator: length": training.length}
