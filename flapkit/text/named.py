"""The datasets that recipes can name, with the splits and separators of FLAP's released code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Purpose = Literal["calibration", "evaluation"]

DEFAULT_SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True)
class NamedDataset:
    """A dataset with a short name for recipes.

    Args:
        description: one line for ``flapkit list datasets``.
        calibration_split: the split to calibrate on.
        evaluation_split: the split to measure perplexity on.
        splits: all splits.
        calibration_separator: text between documents when calibration windows are drawn; None to draw each window
            within one document.
        evaluation_separator: text between documents when evaluation windows are cut.
        evaluation_documents: number of documents to evaluate, from the first; None for all.
        hub: hub id, or None if the text is on this machine.
        subset: configuration on the hub.
        revision: branch on the hub.
        field: the field with the text.
        files: split -> file on the hub, if one shard is enough.
    """

    description: str
    calibration_split: str
    evaluation_split: str
    splits: tuple[str, ...] = ("train", "validation", "test")
    calibration_separator: str | None = DEFAULT_SEPARATOR
    evaluation_separator: str = DEFAULT_SEPARATOR
    evaluation_documents: int | None = None
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    field: str = "text"
    files: Mapping[str, str] | None = None

    def usual_split(self, purpose: Purpose) -> str:
        """Return the split for a purpose."""
        return self.calibration_split if purpose == "calibration" else self.evaluation_split

    def separator(self, purpose: Purpose) -> str | None:
        """Return the text between documents; None to draw each window within one document."""
        return self.calibration_separator if purpose == "calibration" else self.evaluation_separator


# Splits, separators and amounts are those of FLAP's released code, for comparison with its published numbers.
DATASETS: Mapping[str, NamedDataset] = {
    "wikitext2": NamedDataset(
        description="WikiText-2, raw: Wikipedia articles, from the Hugging Face hub",
        calibration_split="train",
        evaluation_split="test",
        calibration_separator=" ",
        hub="Salesforce/wikitext",
        subset="wikitext-2-raw-v1",
    ),
    "ptb": NamedDataset(
        description="Penn Treebank: sentences of the Wall Street Journal, from the Hugging Face hub",
        calibration_split="train",
        evaluation_split="validation",
        calibration_separator=" ",
        hub="ptb-text-only/ptb_text_only",
        # The main branch is a loading script, which `datasets` no longer runs since version 4.
        revision="refs/convert/parquet",
        field="sentence",
    ),
    "c4": NamedDataset(
        description="C4, English: web pages; the first shard of each split, from the Hugging Face hub",
        calibration_split="train",
        evaluation_split="validation",
        splits=("train", "validation"),
        calibration_separator=None,
        evaluation_separator=" ",
        evaluation_documents=1100,
        hub="allenai/c4",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "stdlib": NamedDataset(
        description="The sources of Python's own standard library: on every machine, without a network",
        calibration_split="train",
        evaluation_split="heldout",
        splits=("train", "heldout"),
    ),
}
"""The datasets that recipes can name."""
