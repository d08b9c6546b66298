from __future__ import annotations

import sys
from types import SimpleNamespace

from flapkit import cli


def test_prints_the_address(pruned_folder, monkeypatch, capsys):
    hub = SimpleNamespace(
        create_repo=lambda *arguments, **options: None,
        upload_folder=lambda **options: SimpleNamespace(commit_url="https://hub/commit/1"),
    )
    monkeypatch.setattr("flapkit.checkpoint.push.HfApi", lambda: hub)
    monkeypatch.setattr(sys, "argv", ["flapkit", "push", str(pruned_folder), "owner/name"])
    cli.main()
    assert capsys.readouterr().out == "https://hub/commit/1\n"
