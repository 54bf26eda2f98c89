"""Publishing a saved model on the Hub."""

from __future__ import annotations

import os
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..record import RECORD, Record
from ..saving import FILES, check_files
from .model_card import rename_card


RELEASE_FILES = (RECORD, *dict.fromkeys(name for names in FILES.values() for name in names))
PUBLISHED = (*RELEASE_FILES, "README.md", "*.png", "*.onnx", "*.json")
# `fnmatch` lets a star match slashes, so folders of checkpoints and everything hidden are named.
KEPT_BACK = ("checkpoint-*", "checkpoint-*/*", ".*", "*/.*", "*.bin", "*.pt", "*.pth", "*.pkl")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = "Upload robust model",
    create_pr: bool = False,
    run_as_future: bool = False,
) -> CommitInfo | Future[CommitInfo]:
    """Publishes a saved model, its card and its pictures on the Hub.

    Everything arrives in one commit, so nobody ever sees half of it; a push that was cut off can simply be repeated,
    and what the Hub has already received is not sent again. Checkpoints, pickles and hidden files stay here. Files of
    an earlier model in the repository that this one does not have are deleted in the same commit.

    Args:
        folder (`str`): What [`AutoLoraModel.save_pretrained`] wrote.
        repo_id (`str`): `"org/name"`; created if there is none. Without `"org/"`: your own namespace.
        private (`bool`, *optional*): For a new repository.
        token (*optional*): Token with write permission; the one you are logged in with when left out.
        revision (`str`, *optional*): Branch to push to; created if there is none.
        commit_message (`str`): Message of the commit.
        create_pr (`bool`): Open a pull request instead of committing.
        run_as_future (`bool`): Upload in the background, and return a future.

    Raises:
        FileNotFoundError, ValueError: If the folder is no complete model.
        PermissionError: If you are not logged in, or may not write there.
    """
    folder = Path(folder)
    record = Record.read(folder)
    check_files(folder, record)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        rename_card(folder, repo_id)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            run_as_future=run_as_future,
            allow_patterns=list(PUBLISHED),
            ignore_patterns=list(KEPT_BACK),
            delete_patterns=list(RELEASE_FILES),
        )
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be the name of a repository: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise PermissionError(
                f"The Hub refused to write to {repo_id!r} (status {status}). Log in with a token that may write "
                "(`hf auth login`), or pass `token=`; and check that the namespace is yours."
            ) from error
        raise OSError(f"{repo_id!r} could not be pushed: {error}. Nothing was published; push again.") from error
