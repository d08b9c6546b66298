"""Upload a pruned checkpoint to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from flapkit.checkpoint.card import CARD, published_card
from flapkit.checkpoint.folder import LOCAL_RECIPE, MARK
from flapkit.checkpoint.modeling_file import check_modeling_file
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
    """Upload a checkpoint's folder, with the login of ``huggingface_hub``; its model card then names the repository.

    Args:
        checkpoint: a folder that flapkit wrote.
        repo: the repository, ``owner/name``; created if it does not exist.
        private: create a private repository.
        revision: branch to write to; by default ``main``.
        message: the commit message.
        exports: upload the folder ``exports`` as well.

    Returns:
        The commit's URL.

    Raises:
        ModelError: flapkit did not write the folder, or its modeling file was changed.
        InputError: the repository's name is invalid, or there is no login.
        RunError: the hub refuses, or cannot be reached.
    """
    folder = Path(checkpoint)
    if not (folder / MARK).is_file():
        raise ModelError(f"{folder}: {MARK} is missing; flapkit did not write this folder")
    check_modeling_file(folder, folder)
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if (folder / CARD).is_file():
            card = published_card((folder / CARD).read_text(encoding="utf-8"), repo, revision)
            api.upload_file(
                path_or_fileobj=card.encode(),
                path_in_repo=CARD,
                repo_id=repo,
                revision=revision,
                commit_message="Upload the model card",
            )
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            ignore_patterns=[CARD, LOCAL_RECIPE, f"*/{LOCAL_RECIPE}", *([] if exports else ["exports/*"])],
        )
    except HFValidationError as error:
        raise InputError(f"push {repo}: {error}") from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"push {repo}: not logged in; run `hf auth login` first") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise RunError(f"push {repo}: {error}") from error
    return str(commit.commit_url)
