from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

import flapkit
from flapkit.system.errors import InputError, ModelError, RunError


class Refused(HfHubHTTPError):
    """An answer of the hub's, without the answer."""

    def __init__(self, message):
        Exception.__init__(self, message)


class Hub:
    """Stands for HfApi."""

    def __init__(self, monkeypatch, error=None):
        self.calls, self.error = [], error
        for name in ("create_repo", "upload_file", "upload_folder"):
            monkeypatch.setattr(HfApi, name, getattr(self, name))

    def create_repo(self, repo, **options):
        if self.error:
            raise self.error
        self.calls.append((repo, options))

    def upload_file(self, **options):
        self.calls.append(options)

    def upload_folder(self, **options):
        self.calls.append(options)
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_uploads_the_folder(pruned_folder, monkeypatch):
    hub, local = Hub(monkeypatch), ["README.md", "recipe.local.yaml", "*/recipe.local.yaml"]
    assert flapkit.push(pruned_folder, "owner/name", private=True, revision="dev") == "https://hub/commit/1"
    made, _, uploaded = hub.calls
    assert made == ("owner/name", {"private": True, "exist_ok": True})
    assert (uploaded["folder_path"], uploaded["revision"]) == (pruned_folder, "dev")
    assert uploaded["ignore_patterns"] == [*local, "exports/*"]
    flapkit.push(pruned_folder, "owner/name", exports=True)
    assert hub.calls[-1]["ignore_patterns"] == local


def test_the_card_names_the_repository(pruned_folder, monkeypatch):
    hub, name = Hub(monkeypatch), pruned_folder.name
    flapkit.push(pruned_folder, "owner/name", revision="dev")
    _, uploaded, _ = hub.calls
    card, local = uploaded["path_or_fileobj"].decode(), (pruned_folder / "README.md").read_text()
    assert (uploaded["path_in_repo"], uploaded["revision"]) == ("README.md", "dev")
    assert "\n# owner/name\n" in card
    assert f'"{name}"' in local
    assert f"pretrained={name}," in local
    assert f'"{name}"' not in card
    assert "pretrained=owner/name,revision=dev," in card
    assert 'pipeline("text-generation", "owner/name", revision="dev", trust_remote_code=True)' in card
    assert card.count('"owner/name", revision="dev"') == local.count(f'"{name}"')
    flapkit.push(pruned_folder, "owner/name")
    assert 'flapkit.load("owner/name")' in hub.calls[-2]["path_or_fileobj"].decode()


def test_a_folder_of_another(tmp_path):
    with pytest.raises(ModelError, match=r"flapkit\.json is missing"):
        flapkit.push(tmp_path, "owner/name")


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (HFValidationError("a name"), InputError, "a name"),
        (LocalTokenNotFoundError("token"), InputError, "not logged in"),
        (OfflineModeIsEnabled("offline"), RunError, "offline"),
        (Refused("403"), RunError, "403"),
    ],
)
def test_what_the_hub_refuses(pruned_folder, monkeypatch, error, raised, message):
    Hub(monkeypatch, error)
    with pytest.raises(raised, match=message):
        flapkit.push(pruned_folder, "owner/name")
