"""What a pruned model is worth: perplexity."""

from __future__ import annotations

from flapkit.evaluation.perplexity import Perplexity, PerplexityValues, cross_entropy

__all__ = ["Perplexity", "PerplexityValues", "cross_entropy"]
