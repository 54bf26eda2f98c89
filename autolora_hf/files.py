"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checks import listed, printable


_MOST_CONTAINERS = 1_000_000
# Of a safetensors file; a network of 20,000 tensors takes a sixth of it.
_LARGEST_HEADER = 16 << 20


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
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda path: path == Path(last)):
            (folder / file).chmod(0o666 & ~umask)  # temporary files are private; saved ones follow the user's umask
            (directory / file).parent.mkdir(exist_ok=True)
            os.replace(folder / file, directory / file)
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


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises `OSError` if no file can be written to `path`; to be called before a long computation, not after it."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, but a file is to be written there.")
    # Missing folders will be made.
    home = next(folder for folder in path.absolute().parents if folder.exists())
    if not home.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {home} is no folder.")
    if not os.access(home, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {home} is write-protected.")


def write_json(content: Any, path: str | os.PathLike) -> None:
    """[`write_atomically`] of `content` as JSON: indented, but lists of numbers and short words in one line."""
    text = json.dumps(content, indent=2, allow_nan=False)
    entry = r'(?:-?[\d.][\d.e+-]*|true|false|"[^"\\]{0,16}")'
    # A line break outside of the texts, in which it is escaped, tells a list from brackets in a text.
    flat = re.compile(rf"\[\n\s*({entry}(?:,\n\s*{entry})*)\n\s*\]")
    text = flat.sub(lambda found: "[" + re.sub(r",\n\s+", ", ", found[1]) + "]", text)
    write_atomically(path, (text + "\n").encode())


def read_json(path: Path, largest: int = 64 << 20) -> Any:
    """Contents of a JSON file.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is damaged, nested absurdly or larger than `largest` bytes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise ValueError(f"{path} has {size:,} bytes, more than the {largest:,} a JSON file may have.")
        content = file.read(largest)
    # Three bytes of JSON, such as `{},`, become seventy in memory.
    if content.count(b"{") + content.count(b"[") > _MOST_CONTAINERS:
        raise ValueError(f"{path} has more than {_MOST_CONTAINERS:,} lists and objects and was not read.")
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def inside(directory: Path, name: str) -> Path:
    """The file `name` of a folder, which may come from a stranger.

    Raises:
        ValueError: If it is a link that leads out of the folder. The Hub's cache is made of links into its own store
            of blobs, which are allowed.
    """
    path, home = directory / name, directory.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if path.exists() and not any(path.resolve().is_relative_to(place) for place in allowed):
        raise ValueError(f"{path} is a link out of its folder, to {path.resolve()}, and was not read.")
    return path


# ---- tensors ----


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a safetensors file says of one tensor.

    Args:
        dtype (`str`): As safetensors writes it, such as `"F32"`.
        shape (`tuple[int, ...]`): Its shape.
    """

    dtype: str
    shape: tuple[int, ...]


# Weights are kept in any of these; they are converted when they are copied into a model.
FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"}
_DTYPES[torch.bool] = "BOOL"


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # Clones: safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(exist_ok=True)
    save_file(copies, path, metadata={"format": "pt"})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the saved model is incomplete.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    # One that is longer than its file is found by safetensors.
    if _LARGEST_HEADER < length <= path.stat().st_size:
        raise ValueError(
            f"{path} has a header of {length:,} bytes, more than {_LARGEST_HEADER:,}, and was not loaded."
        )
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated and was not loaded ({printable(str(error))}).") from error


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes in a safetensors file; the file must have the length that they add up to.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is damaged or truncated.
    """
    with _opened(path) as file:
        return _header(file)


def _header(file: Any) -> dict[str, TensorInfo]:
    slices = {name: file.get_slice(name) for name in file.keys()}
    return {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def load_tensors(path: Path, expected: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Reads a safetensors file that must hold exactly the tensors of `expected`, by name, shape and kind.

    Names, shapes and dtypes are compared with the file's header before memory is spent on a tensor. With `None` only
    the dtypes are, and the caller has to check the rest. The result has the dtypes of `expected`.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is damaged, belongs to another model or holds values that are not finite.
    """
    # Opened once, so that what is checked is what is read.
    with _opened(path) as file:
        header = _header(file)
        if expected is None:
            usual = (*FLOATS, *_DTYPES.values())
            odd = [f"{name} ({info.dtype})" for name, info in header.items() if info.dtype not in usual]
            problems = {"of another kind": odd}
        else:
            both = sorted(expected.keys() & header.keys())
            kinds = {name: _kinds(expected[name]) for name in both}
            problems = {
                "missing": sorted(expected.keys() - header.keys()),
                "unexpected": sorted(header.keys() - expected.keys()),
                "of another shape": [name for name in both if header[name].shape != expected[name].shape],
                "of another kind": [
                    f"{name} ({header[name].dtype})" for name in both if header[name].dtype not in kinds[name]
                ],
            }
        check_nothing_wrong(problems, path)
        tensors = {name: file.get_tensor(name) for name in header}
    if expected is not None:
        # Finite doubles may be infinite in the precision of the model.
        tensors = {name: tensor.to(expected[name].dtype) for name, tensor in tensors.items()}
    check_finite(tensors, path, expected)
    return tensors


def check_finite(tensors: dict[str, Tensor], path: Path, expected: Mapping[str, Tensor] | None = None) -> None:
    """Raises `ValueError` if a tensor of a file holds values that are NaN or infinite.

    Some architectures have a tensor at infinity, such as the bounds of a clamp that cuts nothing: what is equal to
    the tensor in `expected` is fine.
    """
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
        and not tensor.isfinite().all()
        and not (expected is not None and name in expected and torch.equal(tensor, expected[name].to(tensor.device)))
    ]
    if bad:
        raise ValueError(f"{path} holds weights that are NaN or infinite ({listed(bad, 5)}). Nothing was loaded.")


def check_nothing_wrong(problems: dict[str, list[str]], path: Path) -> None:
    """Raises `ValueError` if a file holds other tensors than it must; `problems` are their names by what is wrong."""
    found = [f"{what}: {listed(names, 5)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            f"{path} does not belong to this model ({'; '.join(found)}). Nothing was loaded. It was saved from "
            "another architecture, number of classes or AutoLoraConfig."
        )


def _kinds(tensor: Tensor) -> tuple[str | None, ...]:
    return FLOATS if tensor.is_floating_point() else (_DTYPES.get(tensor.dtype),)
