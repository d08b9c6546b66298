"""What a pruned model is worth: perplexity, speed and zero-shot accuracy."""
