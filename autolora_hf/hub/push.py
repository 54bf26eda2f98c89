"""Publishing a saved model on the Hub."""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import huggingface_hub
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from ..consistency import check_files
from ..files import inside
from ..record import RECORD, Record
from ..saving import FILES
from .model_card import rename_card


RELEASE_FILES = (RECORD, *dict.fromkeys(name for names in FILES.values() for name in names))
# Besides, of the folder itself and none inside it: checkpoints and what lies around stay here.
_BESIDE = re.compile(r"README\.md|[^./][^/]*\.(png|onnx|json)")
# With folders of the machine it was trained on; `training_plan.json` has what matters.
_KEPT_BACK = ("training_args.json", "trainer_state.json")
# Files of an earlier model in a repository, which a library would take for the new one.
REPLACED = (*RELEASE_FILES, "*.onnx")
_ATTEMPTS = 10


@overload
def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = "Upload robust model",
    create_pr: bool = False,
    run_as_future: Literal[False] = False,
) -> CommitInfo: ...


@overload
def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = "Upload robust model",
    create_pr: bool = False,
    run_as_future: bool,
) -> CommitInfo | Future[CommitInfo]: ...


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

    Everything arrives in one commit, so nobody ever sees half of it, nor a mixture when two push at once; a push that
    was cut off can simply be repeated, and what the Hub has already received is not sent again. Checkpoints, pickles
    and hidden files stay here. Files of an earlier model in the repository that this one does not have are deleted in
    the same commit.

    Args:
        folder (`str`): What [`AutoLoraModel.save_pretrained`] wrote.
        repo_id (`str`): `"org/name"`; created if there is none. Without `"org/"`: your own namespace.
        private (`bool`, *optional*): For a new repository.
        token (*optional*): Token with write permission; the one you are logged in with when left out.
        revision (`str`, *optional*): Branch to push to; created if there is none.
        commit_message (`str`): Message of the commit.
        create_pr (`bool`): Open a pull request instead of committing.
        run_as_future (`bool`): Upload in the background, after what is already waiting there, and return a future.
            The folder is pushed as it is now, whatever happens to it meanwhile.

    Raises:
        FileNotFoundError, ValueError: If the folder is no complete model.
        PermissionError: If you are not logged in, or may not write there.
        OSError: If the Hub cannot be reached.
    """
    folder = Path(folder)
    record = Record.read(folder)
    check_files(folder, record)
    message = commit_message or "Upload robust model"
    options: dict[str, Any] = {
        "private": private,
        "token": token,
        "revision": revision,
        "message": message,
        "create_pr": create_pr,
    }
    if not run_as_future:
        return _push(folder, repo_id, **options)
    kept = kept_as_it_is(folder, _published(folder))

    def push() -> CommitInfo:
        try:
            return _push(kept, repo_id, **options)
        finally:
            shutil.rmtree(kept, ignore_errors=True)

    return huggingface_hub.run_as_future(push)


def _push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    revision: str | None,
    message: str,
    create_pr: bool,
) -> CommitInfo:
    api = HfApi(token=token)
    with _explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # That of a pull request is there already.
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    rename_card(folder, repo_id)
    with _explained(repo_id):
        return _commit(api, folder, repo_id, revision, message, create_pr)


def _published(folder: Path) -> list[str]:
    """Names of the files to push. Raises `ValueError` if one is a link to something outside the folder."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    chosen = [n for n in names if n in RELEASE_FILES or (_BESIDE.fullmatch(n) and n not in _KEPT_BACK)]
    for name in chosen:
        inside(folder, name)
    return chosen


def _commit(api: HfApi, folder: Path, repo_id: str, revision: str | None, message: str, create_pr: bool) -> CommitInfo:
    """Commits a folder as one commit on top of the one whose files it replaces.

    `HfApi.upload_folder` may split a commit, and does not notice one that came in between.
    """
    names = _published(folder)
    for attempt in range(1, _ATTEMPTS + 1):
        head = api.model_info(repo_id, revision=revision).sha
        old = filter_repo_objects(api.list_repo_files(repo_id, revision=head), allow_patterns=list(REPLACED))
        # Made anew each time, since they remember what was on the Hub.
        operations: list[Any] = [
            CommitOperationDelete(name, is_folder=False) for name in sorted(set(old) - set(names))
        ]
        operations += [CommitOperationAdd(name, folder / name) for name in names]
        try:
            return api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,
            )
        except HfHubHTTPError as error:
            # Somebody else has committed since.
            if _status(error) not in (409, 412) or attempt == _ATTEMPTS:
                raise
            time.sleep(random.uniform(0, 0.5 * attempt))
    raise AssertionError("unreachable")


def kept_as_it_is(folder: Path, names: list[str]) -> Path:
    """A new hidden folder beside `folder` with these of its files, to which nothing happens any more.

    Weights are never changed in place, so they are linked where the disk allows it.
    """
    kept = Path(tempfile.mkdtemp(prefix=f".{folder.name}-push-", dir=folder.resolve().parent))
    for name in names:
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            if not name.endswith(".safetensors"):
                raise OSError
            os.link(folder / name, kept / name)
        except OSError:
            shutil.copyfile(folder / name, kept / name)
    return kept


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turns what goes wrong on the way to the Hub into errors that say what to do; see [`push_folder`]."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be the name of a repository: {error}") from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"{error} Or pass `token=` (`--token`).") from error
    except (HTTPError, ConnectionError, RuntimeError) as error:
        # An upload that fails is a RuntimeError because of what went wrong.
        status = _status(error) or _status(error.__cause__)
        if status in (401, 403):
            raise PermissionError(
                f"The Hub refused to write to {repo_id!r} (status {status}). Log in with a token that may write "
                "(`hf auth login`), or pass `token=` (`--token`); and check that the namespace is yours."
            ) from error
        raise OSError(
            f"{repo_id!r} could not be pushed: {error or type(error).__name__}. The Hub has all of this commit or "
            "nothing; push again."
        ) from error


def _status(error: BaseException | None) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code
