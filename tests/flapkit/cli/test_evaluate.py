"""``flapkit evaluate`` and ``flapkit bench``, as a user types them."""

from __future__ import annotations

import json

from conftest import make_llama


def test_a_checkpoint_is_measured_as_its_run_measured_it(home, recipe, command):
    assert command("run", recipe, "--quiet")[0] == 0
    ran = json.loads((home / "out" / "result.json").read_text())["perplexity"]
    code, out, _ = command("evaluate", "out", "--against", "builtin:tiny-llama", "--json", "--output", "found.json")
    found = json.loads(out)
    assert (code, found) == (0, json.loads((home / "found.json").read_text()))
    for name, measured in ran.items():
        for key in ("dense", "pruned", "bits_per_byte", "protocol", "batch_size"):
            assert found["perplexity"][name][key] == measured[key]
    code, out, _ = command("evaluate", "out")
    assert code == 0
    assert f"{ran['text.txt, 32 tokens']['pruned']:.3f}" in out


def test_what_is_to_be_measured_has_to_be_said(recipe, command):
    code, _, error = command("evaluate", "builtin:tiny-llama")
    assert code == 2
    assert "has no recipe.yaml; give a recipe with --recipe" in error
    code, _, error = command("evaluate", "builtin:tiny-llama", "--recipe", recipe, "--set", "evaluate={}")
    assert code == 2
    assert "nothing to evaluate" in error


def test_bench_prints_a_table_or_json(home, command):
    make_llama().save_pretrained("small")
    small = ("bench", "small", "--prompt", "8", "--tokens", "2", "--repetitions", "1", "--device", "cpu")
    code, out, _ = command(*small)
    assert code == 0
    assert "decode, tokens/s" in out
    assert "batch 1, prompt 8, then 2 tokens" in out
    code, out, _ = command(*small, "--json")
    assert json.loads(out)["workload"]["prompt"] == 8
    assert json.loads(out)["expected"] is None


def test_a_file_that_exists_is_not_replaced(home, command):
    (home / "found.json").write_text("mine")
    code, _, error = command("bench", "builtin:tiny-llama", "--output", "found.json")
    assert code == 2
    assert "found.json: exists already" in error
    assert (home / "found.json").read_text() == "mine"
