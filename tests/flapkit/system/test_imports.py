"""A function is called once a module is imported, and imports nothing itself."""

from __future__ import annotations

import importlib.util
import sys

from flapkit.system.imports import when_imported


def test_a_module_that_comes_later(tmp_path, monkeypatch):
    (tmp_path / "comes_later").mkdir()
    (tmp_path / "comes_later" / "__init__.py").write_text("")
    (tmp_path / "comes_later" / "part.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    seen = []
    for factor in (1, 2):
        when_imported("comes_later.part", lambda module, factor=factor: seen.append(factor * module.value))
    when_imported("comes_later.absent", seen.append)
    assert importlib.util.find_spec("comes_later.part") is not None
    assert importlib.util.find_spec("comes_later.absent") is None
    assert not seen
    importlib.import_module("comes_later.part")
    when_imported("comes_later.part", lambda module: seen.append(3 * module.value))
    assert sorted(seen) == [1, 2, 3]
