"""Put a pruned checkpoint on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from flapkit.checkpoint.folder import MARK
from flapkit.system.errors import InputError, ModelError, RunError


def push(
    checkpoint: Path | str,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a model that flapkit pruned",
    exports: bool = False,
) -> str:
    """Upload a checkpoint's folder, as ``huggingface_hub`` is logged in.

    Args:
        checkpoint: a folder that flapkit wrote.
        repo: the repository, ``owner/name``; made if it is not there.
        private: make it a private one.
        revision: branch to write to; the main one if not given.
        message: the commit's.
        exports: upload the folder ``exports`` as well.

    Returns:
        The commit's address.

    Raises:
        ModelError: the folder is no checkpoint of flapkit's.
        InputError: the repository's name is none, or nobody is logged in.
        RunError: the hub refuses, or cannot be reached.
    """
    folder = Path(checkpoint)
    if not (folder / MARK).is_file():
        raise ModelError(f"{folder}: holds no {MARK}: flapkit did not write it")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=None if exports else ["exports/*"],
        )
    except HFValidationError as error:
        raise InputError(f"push {repo}: {error}") from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"push {repo}: nobody is logged in; `hf auth login` first") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise RunError(f"push {repo}: {error}") from error
    return str(done.commit_url)
