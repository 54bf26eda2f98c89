"""Data sets by name: of a folder, of what `save_to_disk` wrote, or of the Hub."""

from __future__ import annotations

from pathlib import Path

import datasets

from .folders import shorten


def load_source(
    path_or_name: str | Path, split: str | None = None, *, config: str | None = None, revision: str | None = None
) -> datasets.Dataset | Path:
    """Finds data by name, for the command line.

    Args:
        path_or_name (`str` or `Path`): A folder of images by class (or of splits of such folders), a folder written
            by `save_to_disk`, or the name of a data set on the Hub.
        split (`str`, *optional*): Split to take; needed where there is more than one.
        config (`str`, *optional*): For a data set on the Hub: which of its configurations.
        revision (`str`, *optional*): For a data set on the Hub: branch, tag or commit.

    Returns:
        `datasets.Dataset` or `Path`: What [`as_pixel_dataset`] takes.

    Raises:
        FileNotFoundError: If there is no such folder, and no such data set on the Hub or no connection to it.
        ValueError: If the split does not exist, or is needed and missing; the message lists the splits. If a folder is
            given with `config` or `revision`, or a data set on the Hub has no such configuration or cannot be read.
    """
    path = Path(path_or_name).expanduser()
    options = {"name": config, "revision": revision}
    options = {key: value for key, value in options.items() if value is not None}
    if path.is_dir():
        if options:
            raise ValueError(
                f"{str(path_or_name)!r} is a folder: `config` and `revision` are for data sets on the Hub."
            )
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _one_split(datasets.load_from_disk(str(path)), split, path_or_name)
        if split is None:
            return path
        if not (path / split).is_dir():
            found = sorted(x.name for x in path.iterdir() if x.is_dir() and not x.name.startswith("."))
            raise ValueError(f"{str(path)!r} has no split {split!r}. Its sub-folders: {shorten(found)}.")
        return path / split
    name = str(path_or_name)
    if path.exists():
        raise ValueError(f"{name!r} is a file; data must be a folder or the name of a data set on the Hub.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"There is no folder {name!r}.")
    try:
        if split is not None:  # which may also be a slice such as "train[:10%]"
            return datasets.load_dataset(name, split=split, **options)
        return _one_split(datasets.load_dataset(name, **options), split, name)
    except FileNotFoundError as error:  # includes DatasetNotFoundError
        raise FileNotFoundError(
            f"There is no folder {name!r}, and no data set of that name that you may read on the Hub: {error}"
        ) from error
    except ConnectionError as error:
        raise FileNotFoundError(
            f"There is no folder {name!r}, and the Hub, where a data set of that name may be, cannot be reached: "
            f"{error}"
        ) from error
    except datasets.exceptions.DatasetsError as error:  # damaged files and the like; no error of Python's own
        raise ValueError(f"The data set {name!r} cannot be read: {error}") from error


def _one_split(
    found: datasets.Dataset | datasets.DatasetDict, split: str | None, name: str | Path
) -> datasets.Dataset:
    if isinstance(found, datasets.Dataset):
        if split is not None:
            raise ValueError(f"{str(name)!r} is a single data set without splits; leave out the split {split!r}.")
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        asked = "is needed" if split is None else f"{split!r} does not exist"
        raise ValueError(f"{str(name)!r} has the splits {', '.join(found)}: the split {asked}.")
    return found[split]
