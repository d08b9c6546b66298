from __future__ import annotations

from types import SimpleNamespace

from huggingface_hub import HfApi


def test_prints_the_address(command, pruned_folder, monkeypatch):
    for name in ("create_repo", "upload_file"):
        monkeypatch.setattr(HfApi, name, lambda *arguments, **options: None)
    done = SimpleNamespace(commit_url="https://hub/commit/1")
    monkeypatch.setattr(HfApi, "upload_folder", lambda *arguments, **options: done)
    assert command("push", pruned_folder, "owner/name")[:2] == (0, "https://hub/commit/1\n")
