"""Whether the record, the files and the backbone of a saved model belong together, before memory is spent on them."""

from __future__ import annotations

import math
from pathlib import Path

from torch import nn

from .branches import count_values
from .files import TensorInfo, inside, read_header
from .layout import (
    ADAPTER_WEIGHTS,
    BASE_WEIGHTS,
    NATURAL_ADAPTER,
    NATURAL_FACTORS,
    ROBUST_FACTORS,
)
from .record import RECORD, Record


def check_files(directory: Path, record: Record) -> None:
    """Compares the headers of a saved model's files with its record, before any memory is spent on either.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If one is damaged or a link out of the folder, or if the record asks for larger branches or more
            classes than the files have.
    """
    names = (BASE_WEIGHTS,) if record.mode == "full" else (ADAPTER_WEIGHTS, ROBUST_FACTORS)
    robust, natural = _first(directory, *names), _branches_file(directory, record)
    headers = {path: read_header(path) for path in (robust, natural)}
    if record.natural_route == "plain" and record.config["norm"] in ("dual", "split", "frozen"):
        read_header(inside(directory, NATURAL_FACTORS))
    shapes = {info.shape for info in headers[robust].values()}
    if not any(shape and shape[0] == record.num_classes for shape in shapes):
        raise ValueError(f"{robust} has no weights of a classifier of {record.num_classes} classes.")
    if record.branch != "lora":
        _check_rank(directory, record, headers[natural], natural)
        return
    size, asked = 0, 0.0
    for name in record.config["target_modules"]:
        factors = _factors_of(headers[natural], name, natural)
        # The rank of a file's factors is at least that of the record, but for grouped layers, which cannot have as
        # many: theirs is the width of the layer.
        widest = max((side for info in factors for side in info.shape), default=0)
        if record.rank(name) > max(widest, 1024):
            raise ValueError(
                f"{directory / RECORD} asks for rank {record.rank(name):,} of {name}, but its branch in {natural} has "
                f"at most {widest:,}: the ranks cannot be right."
            )
        for info in factors:
            elements, rank = math.prod(info.shape), min(filter(None, info.shape), default=1)
            size += elements
            asked += elements * record.rank(name) / rank
    if asked > 64 * size + 1e6:
        raise ValueError(
            f"{directory / RECORD} asks for branches of about {asked:,.0f} values, but {natural} holds {size:,}: the "
            "ranks cannot be right."
        )


def _branches_file(directory: Path, record: Record) -> Path:
    """The file with every branch of a saved model."""
    if record.natural_route == "branch":
        return _first(directory, NATURAL_ADAPTER, NATURAL_FACTORS)
    return _first(directory, *((BASE_WEIGHTS,) if record.mode == "full" else (ADAPTER_WEIGHTS, ROBUST_FACTORS)))


def _first(directory: Path, *names: str) -> Path:
    """The file of these that a folder has; the first one if it has none."""
    paths = [inside(directory, name) for name in names]
    return next((path for path in paths if path.is_file()), paths[0])


def check_branches(network: nn.Module, record: Record, directory: Path) -> None:
    """Compares what a record says of the layers of its backbone with the backbone, before branches are made.

    Raises:
        ValueError: If it names layers that the backbone does not have, or if their branches would be far larger than
            those in the folder's files.
    """
    modules = dict(network.named_modules())
    named = [*record.config["target_modules"], *(record.config["modules_to_save"] or [])]
    strangers = [name for name in named if name not in modules]
    if strangers:
        raise ValueError(
            f"{directory / RECORD} names {len(strangers)} layers that {type(network).__name__} does not have, such as "
            f"{strangers[0]}."
        )
    unable = [name for name in record.config["target_modules"] if not modules[name]._parameters]
    if unable:
        return  # told in words when the branches are made
    config = record.autolora_config()
    asked = count_values(config, {name: modules[name] for name in record.config["target_modules"]})
    natural = _branches_file(directory, record)
    held = sum(math.prod(info.shape) for info in read_header(natural).values())
    if asked > 2 * held + 1_000_000:
        raise ValueError(
            f"{directory / RECORD} asks for branches of {asked:,} values, but {natural} holds {held:,}: the ranks "
            "cannot be right."
        )


def _check_rank(directory: Path, record: Record, header: dict[str, TensorInfo], file: Path) -> None:
    """A rank that is far larger than any side in the file; how large branches are is seen with the network."""
    names = record.config["target_modules"]
    prefixes = tuple(f"{prefix}{name}." for name in names for prefix in ("base_model.model.", ""))
    held = [info for key, info in header.items() if key.startswith(prefixes)]
    if names and not held:
        raise ValueError(f"{file} does not belong to this model (missing: its branches). Nothing was loaded.")
    widest = max((side for info in held for side in info.shape), default=0)
    most = max([record.config["r"], *record.config["rank_pattern"].values()])
    if most > max(widest, 1024):
        raise ValueError(
            f"{directory / RECORD} asks for rank {most:,}, but the branches in {file} have at most {widest:,}: the "
            "ranks cannot be right."
        )


def _factors_of(header: dict[str, TensorInfo], layer: str, file: Path) -> list[TensorInfo]:
    for pattern in ("base_model.model.{}.{}.weight", "{}.{}"):
        names = [pattern.format(layer, side) for side in ("lora_A", "lora_B")]
        if all(name in header for name in names):
            return [header[name] for name in names]
    raise ValueError(f"{file} does not belong to this model (missing: the branch of {layer}). Nothing was loaded.")
