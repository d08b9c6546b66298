from __future__ import annotations

import hashlib
import json

import pytest

import flapkit
from flapkit.checkpoint.load import load_config, open_weights
from flapkit.system.errors import ModelError

FILE = "modeling_flapkit_llama.py"
READERS = {"load": flapkit.load, "load_config": load_config, "open_weights": open_weights}
COMMANDS = {
    "evaluate": ["evaluate", "pruned", "--recipe", "recipe.yaml"],
    "export": ["export", "pruned", "--to", "hf", "--output", "out"],
    "bench": ["bench", "pruned"],
    "push": ["push", "pruned", "owner/name"],
    "recover": ["recover", "pruned", "recipe.yaml", "--set", "compensator=lora"],
    "check": ["check", "recipe.yaml", "--set", "model.path=pruned"],
    "run": ["run", "recipe.yaml", "--set", "model.path=pruned"],
}


def change(folder, name, old, new):
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new, 1))


def test_its_hash_is_recorded_and_on_the_card(pruned_folder):
    digest = hashlib.sha256((pruned_folder / FILE).read_bytes()).hexdigest()
    assert json.loads((pruned_folder / "flapkit.json").read_text())["modeling"] == {FILE: digest}
    assert f"{digest}  {FILE}" in (pruned_folder / "README.md").read_text()


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_changed_file_is_refused(pruned_folder, reader):
    reader(pruned_folder)
    (pruned_folder / FILE).write_text((pruned_folder / FILE).read_text() + "\nimport os\n")
    with pytest.raises(ModelError, match=rf"{FILE} was changed.*flapkit\.json.*get it again") as refused:
        reader(pruned_folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_commands_refuse_it_in_one_line(command, recipe, pruned_folder, arguments):
    (pruned_folder / FILE).write_text("import os\n")
    code, out, err = command(*arguments)
    assert code
    (line,) = [line for line in (out + err).splitlines() if line.startswith("error: ")]
    assert f"{FILE} was changed" in line
    assert not (pruned_folder.parent / "out").exists()


def test_other_code_is_refused(pruned_folder):
    """``auto_map`` may name another file, or one on the hub."""
    for other in ("trap", "owner/repository--trap"):
        change(pruned_folder, "config.json", f'"{FILE[:-3]}.FlapkitLlamaModel"', f'"{other}.FlapkitLlamaModel"')
        with pytest.raises(ModelError, match=rf"auto_map in config\.json names {other}\.py, which flapkit did not"):
            flapkit.load(pruned_folder)
        change(pruned_folder, "config.json", f'"{other}.FlapkitLlamaModel"', f'"{FILE[:-3]}.FlapkitLlamaModel"')
    flapkit.load(pruned_folder)


def test_a_missing_file_or_a_damaged_entry_is_refused(pruned_folder):
    (pruned_folder / FILE).rename(pruned_folder / "aside")
    with pytest.raises(ModelError, match=f"{FILE} cannot be read"):
        flapkit.load(pruned_folder)
    (pruned_folder / "flapkit.json").write_text('{"modeling": 3}')
    with pytest.raises(ModelError, match="modeling is damaged"):
        flapkit.load(pruned_folder)


def test_a_folder_without_the_entry_is_not_checked(pruned_folder, tmp_path):
    """As one that ``save_pretrained`` wrote."""
    flapkit.load(pruned_folder).save_pretrained(tmp_path / "again")
    flapkit.load(tmp_path / "again")
