"""Reads the files of tensors that research code publishes, without running anything that is in them.

A safetensors file holds tensors and nothing else. Anything else is given to `torch.load(weights_only=True)`, which
builds tensors and containers only; there is no way here around that.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import listed, printable, shown
from ..files import load_tensors


# Where the networks lie in a checkpoint, the first one that is there being taken: the order of `get_model` in
# GodXuxilie/RobustSSL_Benchmark, `utils.py`; then what RobustBench's `load_model` takes of Andriushchenko2020 and
# Kireev2021.
ROOTS = ("state_dict_dual", "state_dict", "model", "last")
_MOST_KEYS = 100_000


class _Unread:
    """Stands in for a value that is no weight, such as an accuracy in NumPy's type, and keeps nothing of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Unread:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# Plain values that training scripts save next to the weights. None of these is called: each name stands for a class of
# ours, so that what NumPy would make of a crafted argument does not matter.
_UNREAD = [
    ("argparse", "Namespace"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(("numpy.dtypes", f"{kind}DType") for kind in ("Float16", "Float32", "Float64", "Int32", "Int64", "Bool")),
]
_STAND_INS = [type(name, (_Unread,), {"__module__": module}) for module, name in _UNREAD]

_HOW_TO_CONVERT = """\
To convert it, load it where it can do no harm, such as a container without a network that you throw away, and bring \
back the weights alone:

    import torch; from safetensors.torch import save_file
    saved = torch.load({name!r}, map_location="cpu", weights_only=False)  # runs whatever is in the file
    weights = next((saved[k] for k in {roots} if k in saved), saved)
    save_file({{k: v.clone().contiguous() for k, v in weights.items()}}, "weights.safetensors")

Files of MadryLab/robustness and robust-models-transfer also need `pip install dill` there and \
`pickle_module=dill` in `torch.load`. Then convert weights.safetensors."""


@dataclass(frozen=True)
class CheckpointFile:
    """The tensors of one network in a file.

    Args:
        tensors (`dict[str, Tensor]`): By the names they have in the file.
        root (`str`, *optional*): The entry of the file that holds them; `None` if they are the file.
        ignored (`list[str]`): Other entries, such as the state of an optimiser.
        sha256 (`str`), bytes (`int`): Of the file.
    """

    tensors: dict[str, Tensor]
    root: str | None
    ignored: list[str] = field(default_factory=list)
    sha256: str = ""
    bytes: int = 0


def read_checkpoint(path: Path) -> CheckpointFile:
    """Reads a safetensors file, or a file of `torch.save` that holds nothing but tensors and plain values.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged; if it would need code to be loaded, and the message says which and how to convert
            it; or if it holds no state dict.
    """
    if not path.is_file():
        what = "is a folder; name the file in it" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}.")
    if path.suffix == ".safetensors":
        digest, size = _digest(path), path.stat().st_size
        return CheckpointFile(load_tensors(path, None), None, [], digest, size)
    # Read once, so that what is hashed and checked is what is loaded.
    content = path.read_bytes()
    _check_archive(content, path)
    root, tensors, ignored = _network(_load(content, path), path)
    return CheckpointFile(tensors, root, ignored, hashlib.sha256(content).hexdigest(), len(content))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_archive(content: bytes, path: Path) -> None:
    """Refuses an archive that unpacks to more than itself: `torch.save` does not compress, so nothing needs it."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return
    try:
        entries = zipfile.ZipFile(io.BytesIO(content)).infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged and was not loaded ({printable(str(error))}).") from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    unpacked = sum(entry.file_size for entry in entries)
    if packed or unpacked > len(content):
        raise ValueError(
            f"{path} is an archive of {len(content):,} bytes that would unpack to {unpacked:,}; torch writes no such "
            f"files, and it was not loaded. Compressed entries: {listed(packed, 3)}."
        )


def _load(content: bytes, path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list[Any](_STAND_INS)):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a crafted file makes of the reader
        message = str(error)
        wanted = re.search(r"(?:Unsupported global: |unsupported )GLOBAL (\S+)", message)
        if wanted is not None:
            raise ValueError(
                f"{path} was not loaded: to open it, Python would have to import and call "
                f"`{printable(wanted[1], 200)}`, and a pickle that calls code can do anything. Nothing of it was run. "
                + _HOW_TO_CONVERT.format(name=path.name, roots=ROOTS[:3])
            ) from None
        if "weights_only" in message or "Weights only" in message:
            # torch's own advice there is to load it with code.
            reason = printable(message.partition("WeightsUnpickler error: ")[2].partition("\n")[0] or message)
            raise ValueError(
                f"{path} is no file of plain tensors and was not loaded ({reason}). Nothing of it was run. "
                + _HOW_TO_CONVERT.format(name=path.name, roots=ROOTS[:3])
            ) from None
        raise ValueError(
            f"{path} is damaged, or no file of torch or safetensors, and was not loaded "
            f"({type(error).__name__}: {printable(message)})."
        ) from error


def _network(content: Any, path: Path) -> tuple[str | None, dict[str, Tensor], list[str]]:
    """Root, tensors by name, and other entries of what a file holds."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of weights.")
    root = next((name for name in ROOTS if isinstance(content.get(name), Mapping)), None)
    tensors = content if root is None else content[root]
    ignored = [] if root is None else sorted(str(name) for name in content if name != root)
    if not tensors or len(tensors) > _MOST_KEYS:
        raise ValueError(f"{path} holds {len(tensors):,} weights{f' under {root!r}' if root else ''}.")
    odd = [key for key in tensors if not isinstance(key, str)]
    odd += [key for key, value in tensors.items() if isinstance(key, str) and not _plain(value)]
    if odd:
        found = listed([key if isinstance(key, str) else shown(key) for key in odd], 5)
        raise ValueError(
            f"{path} is no state dict: {found} {'are' if len(odd) > 1 else 'is'} no plain tensor"
            + (f", and there is no entry {', '.join(map(repr, ROOTS))} with weights." if root is None else ".")
        )
    return root, {key: value.detach() for key, value in tensors.items()}, ignored


def _plain(value: Any) -> bool:
    """Whether it is a dense tensor in memory, not larger than what the file holds of it."""
    if not isinstance(value, Tensor) or type(value) not in (Tensor, torch.nn.Parameter):
        return False
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
        return False
    # With a stride of 0 one number is a tensor of any size, until something is computed with it.
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
