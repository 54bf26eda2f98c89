"""Checkpoints on disk: complete ones carry a seal, and what a run still needs is never deleted."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import read_json, write_json


logger = logging.getLogger(__name__)

SEAL = "checkpoint.json"
# Folders that are being written or deleted; hidden, so that nobody takes them for checkpoints.
_WRITING, _DELETING = ".incomplete-", ".deleting-"


def checkpoint_folder(run: str | os.PathLike, step: int) -> Path:
    """Where a run keeps its checkpoint of an optimizer step."""
    return Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


@contextmanager
def incomplete(folder: Path) -> Iterator[Path]:
    """A hidden folder to write a checkpoint into, which [`complete`] turns into `folder`.

    Raises:
        OSError: If writing fails, with what to do; the folder is deleted and older checkpoints stay as they are.
    """
    staging = folder.with_name(f"{_WRITING}{folder.name}")
    try:
        yield staging
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors report a full disk as errors of their own kinds.
        shutil.rmtree(staging, ignore_errors=True)
        older = [path.name for path in checkpoints(folder.parent) if path != folder]
        last = f"The last good checkpoint is {older[-1]}" if older else "There is no older checkpoint"
        raise OSError(
            f"{folder} could not be written: {error}. {last} in {folder.parent}. Free some space (or lower "
            "`save_total_limit`) and go on with `resume_from_checkpoint=True`."
        ) from error


def complete(staging: Path, folder: Path, **facts: Any) -> None:
    """Seals what was written into `staging` and makes it appear as `folder`, all at once.

    The seal holds size and SHA-256 of every file, the time, and `facts`. Everything is on the disk before the folder
    has its name, so that not even a power cut leaves a part of it.
    """
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    seals = {path.relative_to(staging).as_posix(): _measure(path) for path in files}
    write_json({"saved_at_ns": time.time_ns(), **facts, "files": seals}, staging / SEAL)
    for path in (*files, staging):
        _sync(path)
    if folder.exists():
        # Of an earlier run, or damaged.
        delete(folder)
    os.replace(staging, folder)
    _sync(folder.parent)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, `None` if every file is there and as it was written."""
    try:
        files = read_json(folder / SEAL)["files"]
        for name, seal in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != seal["size"] or _measure(path) != seal:
                return f"{name} is not what was written (checksum)"
    except FileNotFoundError:
        return f"it has no {SEAL}: it was never finished, or another program wrote it"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{SEAL} cannot be read ({error})"
    return None


def checkpoints(run: str | os.PathLike) -> list[Path]:
    """The sealed checkpoints of a folder, in the order in which they were saved. Their files are not checked.

    Time decides, not the number of steps: a folder may hold checkpoints of an earlier, longer run.
    """
    found = []
    for folder in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            found.append((int(read_json(folder / SEAL)["saved_at_ns"]), folder))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return [folder for _, folder in sorted(found)]


def last_whole_checkpoint(run: str | os.PathLike) -> Path | None:
    """The latest checkpoint without damage; warns about every later one that is passed over. `None` without any."""
    sealed = checkpoints(run)
    for folder in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if folder not in sealed:
            logger.warning("%s is passed over: %s.", folder, damage(folder))
    for folder in reversed(sealed):
        problem = damage(folder)
        if problem is None:
            return folder
        logger.warning("%s is damaged and passed over: %s. The checkpoint before it is used.", folder, problem)
    return None


def delete_obsolete(run: str | os.PathLike, limit: int | None) -> None:
    """Deletes all but the last `limit` checkpoints and the best one of each of them.

    If the last one turns out to be damaged, the run goes back to the one before, and then needs the weights that were
    the best at that time.
    """
    clean(run)
    sealed = checkpoints(run)
    if limit is None or limit <= 0 or len(sealed) <= limit:
        return
    kept = set(sealed[-limit:])
    for folder in sealed[-limit:]:
        best = read_json(folder / TRAINER_STATE_NAME).get("best_model_checkpoint")
        if best:
            kept.add(Path(run) / Path(best).name)
    for folder in sealed:
        if folder not in kept:
            delete(folder)


def delete(folder: Path) -> None:
    """Takes a checkpoint away at once, then deletes its files."""
    hidden = folder.with_name(f"{_DELETING}{uuid.uuid4().hex}")
    os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clean(run: str | os.PathLike) -> None:
    """Removes what a killed process was writing or deleting."""
    for prefix in (_WRITING, _DELETING):
        for folder in Path(run).glob(f"{prefix}*"):
            shutil.rmtree(folder, ignore_errors=True)


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some file systems cannot do it for a folder.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
