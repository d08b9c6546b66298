"""Checkpoints: load models, and save pruned ones."""

from __future__ import annotations

from flapkit.checkpoint.folder import check_output, new_folder
from flapkit.checkpoint.load import load, load_config, load_tokenizer, open_weights
from flapkit.checkpoint.save import save

__all__ = ["check_output", "load", "load_config", "load_tokenizer", "new_folder", "open_weights", "save"]
