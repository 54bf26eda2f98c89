"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


@contextmanager
def staged(directory: Path, last: str) -> Iterator[Path]:
    """A folder to write into; on success its files move to `directory` one by one, `last` being the final one.

    A reader that finds `last` therefore finds everything, and an interrupted writer leaves no partial file. An older
    `last` goes before the first file comes, so that old and new files are never taken for one model.
    """
    directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        yield folder
        (directory / last).unlink(missing_ok=True)
        umask = os.umask(0)
        os.umask(umask)
        for file in sorted(folder.iterdir(), key=lambda path: path.name == last):
            file.chmod(0o666 & ~umask)  # temporary files are private; saved ones follow the user's umask
            os.replace(file, directory / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to `path`, creating its folder; a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: Any, path: str | os.PathLike) -> None:
    """[`write_atomically`] of `content` as JSON."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # Clones: safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    save_file(copies, path, metadata={"format": "pt"})


def load_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the saved model is incomplete.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated and was not loaded ({error}).") from error
