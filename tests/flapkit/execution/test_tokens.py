"""The tokens of a text are found again, and are those of the text."""

from __future__ import annotations

import pytest
import torch
from conftest import RECIPE, write_recipe

from flapkit.checkpoint.load import load_tokenizer
from flapkit.execution import cache as cached
from flapkit.execution.cache import TokenCache, clear, entries
from flapkit.recipe.load import load_recipe
from flapkit.run.pipeline import run
from flapkit.text import tokenise, windows
from flapkit.text.windows import draw_windows, encode, encode_measured

TEXT = "".join(f"def f{n}(größe):\n    return größe * {n}\n" for n in range(300))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The texts that are tokenised; short ones are kept as well."""
    seen: list[str] = []
    encode_ = tokenise.encode_in_chunks
    monkeypatch.setattr(windows, "CHUNK", 100)
    monkeypatch.setattr(
        windows, "encode_in_chunks", lambda *asked, **options: seen.append(asked[1]) or encode_(*asked, **options)
    )
    return seen


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:tiny-llama")


def test_a_text_is_tokenised_once(calls, tokenizer, cache):
    expected = encode_measured(tokenizer, [TEXT], "")
    store = TokenCache(cache)
    for _ in range(2):
        found = encode_measured(tokenizer, [TEXT], "", store=store)
        later = encode_measured(tokenizer, [TEXT], "", store=TokenCache(cache))
        for each in (found, later):
            assert each.tokens.dtype == torch.long
            assert torch.equal(each.tokens, expected.tokens)
            assert torch.equal(each.sizes, expected.sizes)
    assert len(calls) == 2
    (entry,) = entries(cache)
    assert entry.statistic == "tokens"
    assert clear(cache) == [entry]
    assert not entries(cache)


def test_other_text_or_another_tokenizer_is_tokenised_anew(calls, tokenizer, cache):
    other = load_tokenizer("builtin:tiny-llama")
    other.add_tokens(["größe"])
    first = encode(tokenizer, [TEXT], "", store=TokenCache(cache))
    assert not torch.equal(encode(other, [TEXT], "", store=TokenCache(cache)), first)
    encode(tokenizer, [TEXT, "x"], "", store=TokenCache(cache))
    encode_measured(tokenizer, [TEXT], "", store=TokenCache(cache))
    assert len(calls) == 4


def test_without_a_folder_tokens_stay_in_memory(calls, tokenizer, cache):
    store = TokenCache(None)
    drawn = [draw_windows(tokenizer, [TEXT], "", samples=4, length=16, seed=seed, store=store) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len(calls) == 1
    assert not entries(cache)


def test_a_damaged_file_is_made_again(calls, tokenizer, cache, caplog):
    expected = encode(tokenizer, [TEXT], "", store=TokenCache(cache))
    (file,) = (cache / "tokens").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert torch.equal(encode(tokenizer, [TEXT], "", store=TokenCache(cache)), expected)
    assert "damaged" in caplog.text
    assert torch.equal(encode(tokenizer, [TEXT], "", store=TokenCache(cache)), expected)
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written(calls, tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert len(encode(tokenizer, [TEXT], "", store=TokenCache(tmp_path / "file")))
    assert "tokens cannot be cached" in caplog.text


def test_a_second_run_tokenises_nothing(calls, home, cache):
    (home / "text.txt").write_text(TEXT)
    texts = [{"dataset": "text.txt", "length": 32, "windows": 4}]
    texts.append({"dataset": "text.txt", "length": 32, "stride": 16, "windows": 4})
    recipe = write_recipe(home, evaluate={"perplexity": texts})
    first = run(load_recipe(recipe), cache=cache)
    # Once for the calibration windows, and once with the bytes of each token for both evaluations.
    assert len(calls) == 2
    second = run(load_recipe(recipe, ["output=again"]), cache=cache)
    assert len(calls) == 2
    assert torch.equal(first.text.calibration, second.text.calibration)
    assert first.perplexity == second.perplexity
    assert {cached.STATISTICS, cached.TOKENS} == {path.name for path in cache.iterdir()}
    assert RECIPE["calibration"]["samples"] == len(first.text.calibration)
