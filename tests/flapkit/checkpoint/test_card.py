from __future__ import annotations

from conftest import make_llama
from huggingface_hub import ModelCard

import flapkit
from flapkit.checkpoint.card import licence_of, model_card

METADATA = {
    "model": {"path": "owner/base"},
    "metric": {"name": "wifv"},
    "searcher": {"name": "al_am"},
    "compensator": [{"name": "bias"}],
}
RESULT = {"params": {"dense": 100, "pruned": 80}, "perplexity": {"text": {"dense": 4.0, "pruned": 5.0}}}


def test_says_what_the_model_is():
    card = model_card("mine", "owner/base", metadata=METADATA, result=RESULT, recipe="budget: {ratio: 0.2}\n")
    data = ModelCard(card).data
    assert (data.base_model, data.library_name, data.license) == ("owner/base", "transformers", None)
    assert "flapkit" in data.tags
    for part in (
        "of owner/base",
        "by wifv, al_am, bias",
        "| parameters | 100 | 80 |",
        "| perplexity, text | 4.000 | 5.000 |",
    ):
        assert part in card
    assert "budget: {ratio: 0.2}" in card


def test_the_licence_of_the_dense_model(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nHello")
    assert licence_of(str(tmp_path)) == "mit"
    card = model_card("mine", str(tmp_path), metadata={}, result=None, recipe=None)
    assert ModelCard(card).data.license == "mit"
    # Nobody else needs to know where it lay.
    assert str(tmp_path.parent) not in card
    (tmp_path / "README.md").write_text("---\nlicense: [1\n---\n")
    assert licence_of(str(tmp_path)) is None
    assert licence_of("") is None
    assert licence_of("nobody/no-such-model") is None


def test_lies_in_every_checkpoint(tokens, tmp_path):
    model = make_llama()
    flapkit.save(model, tmp_path / "mine", flapkit.prune_(model, tokens, ratio=0.4))
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.pipeline_tag == "text-generation"
    assert card.text.strip().startswith("# mine")
