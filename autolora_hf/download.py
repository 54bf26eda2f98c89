"""Fetching files of repositories on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


def is_repository_name(name: str) -> bool:
    """Whether `name` has the form `"org/name"` of a repository on the Hub."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".")


def download(
    name: str,
    files: Iterable[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Path:
    """Fetches some files of a Hub repository, all of one commit, into the cache, and returns their folder.

    Files that the repository does not have are left out. What is in the cache is not fetched again, a download that
    was cut off goes on where it ended, and without a network the cache alone is used, as everywhere in
    huggingface-hub.

    Args:
        name (`str`): Repository `"org/name"`.
        files (`Iterable[str]`): Names or patterns of the files.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str` or `bool`, *optional*): As in huggingface-hub.
        cache_dir (`str`, *optional*): Another cache than the usual one.
        local_files_only (`bool`): Do not look on the Hub.

    Raises:
        FileNotFoundError: If there is no such repository or revision, or one may not see it.
        PermissionError: If the repository is gated and access was not granted, or the token is not valid.
        OSError: If the Hub cannot be reached and the cache does not have it.
    """
    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=list(files),
            )
        )
    except GatedRepoError as error:
        raise PermissionError(
            f"{name} is gated: ask for access on its page, and log in (`hf auth login`) or pass `token=`."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no repository {name!r} on the Hub that you may see. Check the name; for a private one log in "
            "(`hf auth login`) or pass `token=`."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{name} has no revision {revision!r}.") from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(str(error)) from error
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{name}{at} is not in the cache, or only a part of it, and the Hub was not asked or could not be "
            "reached. Check your network, HF_HUB_OFFLINE and `local_files_only`."
        ) from error
    except (HFValidationError, ValueError) as error:
        # Also what huggingface-hub says to names of files that would leave the cache.
        raise ValueError(f"{name}{at} was refused: {error}") from error
    except (HTTPError, OSError, RuntimeError) as error:
        # A RuntimeError comes of parallel downloads, one of which closed the connection of the others.
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise PermissionError(
                f"The Hub refused {name}{at} (status {error.response.status_code}). Check the token you pass, or log "
                "in again (`hf auth login`)."
            ) from error
        raise OSError(f"{name}{at} could not be fetched from the Hub: {error}") from error


def commit_of(folder: Path) -> str | None:
    """Commit of a folder that [`download`] gave."""
    return folder.name if folder.parent.name == "snapshots" else None
