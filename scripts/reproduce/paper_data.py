"""The six data sets of the paper, read from the files that their authors distribute.

Each is a description with the official numbers of classes and images, which are checked when it is read. A test set is
marked as one, so that the package refuses it as validation data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import datasets
import numpy as np
import scipy.io
from torch.utils.data import Dataset


_SHOWN = 3


class Splits(NamedTuple):
    """Training and test images of a data set, as `autolora_hf` takes them."""

    train: Any
    test: Any


class ArrayImages(Dataset):
    """Images in memory: items are a uint8 array H x W x 3 and a class index.

    `targets`, `classes` and `split` are where `autolora_hf` looks for them.
    """

    def __init__(self, images: np.ndarray, targets: Sequence[int], classes: Sequence[str], split: str) -> None:
        self.images, self.targets, self.classes, self.split = images, list(targets), list(classes), split

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], self.targets[index]


@dataclass(frozen=True)
class ImageFiles:
    """Files of images with their classes.

    Args:
        names (`list[str]`): Paths below the folder of images.
        labels (`list[int]`): Class indices from 0.
    """

    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class DataSet:
    """A data set as its authors distribute it.

    Args:
        key (`str`): What the command line and the folders of runs call it.
        title (`str`): What the paper calls it.
        url (`str`): The page it is downloaded from.
        folder (`str`): Folder that its archives unpack to, or that they should be unpacked in.
        classes (`int`): Number of classes.
        images (`int`): Number of images, training and test images together.
        train, test (`int`, *optional*): Numbers of each. `None`: a rule makes them, and `images` alone is checked.
        image_size (`int`): Side of the images that the network gets.
    """

    key: str
    title: str
    url: str
    folder: str
    classes: int
    images: int
    train: int | None
    test: int | None
    image_size: int = 224

    def load(self, folder: str | Path) -> Splits:
        """Reads the data set from its own folder, or from the folder in which that lies.

        Raises:
            FileNotFoundError: If files are missing; the message names them and where they are to be had.
            ValueError: If a file is damaged, or the data set is not complete.
        """
        folder = Path(folder).expanduser()
        root = folder / self.folder if (folder / self.folder).is_dir() else folder
        if not root.is_dir():
            raise FileNotFoundError(f"{self.title}: there is no folder {root}. {self._where()}")
        splits = self._read(root)
        self._check_counts(root, splits)
        return splits

    def _read(self, root: Path) -> Splits:
        raise NotImplementedError

    # ---- checks ----

    def _check_counts(self, root: Path, splits: Splits) -> None:
        labels = [_labels(part) for part in splits]
        train, test = (len(part) for part in labels)
        found = {"images": train + test, "training images": train, "test images": test}
        expected = {"images": self.images, "training images": self.train, "test images": self.test}
        wrong = [
            f"{found[name]:,} {name} instead of {number:,}"
            for name, number in expected.items()
            if number is not None and number != found[name]
        ]
        names = _class_names(splits.train)
        if len(names) != self.classes:
            wrong.insert(0, f"{len(names)} classes instead of {self.classes}")
        if wrong:
            raise ValueError(
                f"{root} is not the whole of {self.title}: {'; '.join(wrong)}. A figure for a part of it would not "
                f"be the paper's. {self._where()}"
            )
        without = sorted(set(range(self.classes)) - set(labels[0]))
        if without:
            self._damaged(root, f"no training images of {_listed([names[label] for label in without])}")

    def _file(self, path: Path) -> Path:
        if not path.is_file():
            raise FileNotFoundError(f"{self.title}: {path} is missing. {self._where()}")
        return path

    def _lines(self, path: Path) -> list[str]:
        """The lines of a text file that are not empty."""
        try:
            text = self._file(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            self._damaged(path, f"it is no text ({error})", error)
        return [line.strip() for line in text.splitlines() if line.strip()]

    def _damaged(self, path: Path, reason: str, cause: Exception | None = None) -> NoReturn:
        raise ValueError(f"{self.title}: {path} is damaged: {reason}. {self._where()}") from cause

    def _where(self) -> str:
        return f"Unpack what {self.url} offers; scripts/reproduce/README.md says how the folder must look."

    def _from_files(self, root: Path, classes: Sequence[str], train: ImageFiles, test: ImageFiles) -> Splits:
        """Two data sets of image files below `root`, none of which is in both."""
        both = sorted(set(train.names) & set(test.names))
        if both:
            self._damaged(root.parent, f"{len(both)} images are in both splits: {_listed(both)}")
        parts = []
        for split, files in (("train", train), ("test", test)):
            outside = [name for name in files.names if Path(name).is_absolute() or ".." in Path(name).parts]
            if outside:
                self._damaged(root.parent, f"its lists name files outside of it: {_listed(outside)}")
            missing = [name for name in files.names if not (root / name).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{self.title}: {len(missing):,} of {len(files.names):,} {split} images are missing in {root}: "
                    f"{_listed(missing)}. {self._where()}"
                )
            info = datasets.DatasetInfo(
                features=datasets.Features(
                    {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))}
                ),
                dataset_name=self.key,
                builder_name="reproduce",
            )
            columns = {"image": [str(root / name) for name in files.names], "label": files.labels}
            parts.append(datasets.Dataset.from_dict(columns, info=info, split=split))
        return Splits(*parts)


@dataclass(frozen=True)
class Cifar(DataSet):
    """CIFAR-10 and CIFAR-100, the "binary version": the Python version is made of pickles.

    A record is one byte a label and 3 x 32 x 32 bytes of pixels, channels first.

    Args:
        train_files, test_files (`tuple[str, ...]`): Files of records.
        names_file (`str`): Names of the classes, one a line.
        label_bytes (`int`): Labels before the pixels, the last of which is the class.
    """

    image_size: int = 32
    train_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    names_file: str = ""
    label_bytes: int = 1

    def _read(self, root: Path) -> Splits:
        classes = self._lines(root / self.names_file)
        train = self._records(root, self.train_files, classes, "train")
        return Splits(train, self._records(root, self.test_files, classes, "test"))

    def _records(self, root: Path, files: Sequence[str], classes: Sequence[str], split: str) -> ArrayImages:
        images, labels = [], []
        for name in files:
            path = self._file(root / name)
            content, length = np.fromfile(path, dtype=np.uint8), self.label_bytes + 3 * 32 * 32
            if content.size == 0 or content.size % length:
                self._damaged(path, f"{content.size:,} bytes are no whole number of records of {length:,}")
            records = content.reshape(-1, length)
            of_file = records[:, self.label_bytes - 1]
            if of_file.max() >= len(classes):
                self._damaged(path, f"it has label {of_file.max()}, and {self.names_file} {len(classes)} classes")
            images.append(records[:, self.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels.append(of_file)
        together = np.ascontiguousarray(np.concatenate(images))
        return ArrayImages(together, np.concatenate(labels).tolist(), classes, split)


@dataclass(frozen=True)
class Dtd(DataSet):
    """Describable Textures, first of ten splits: its training and validation lists train, as in the paper's code."""

    def _read(self, root: Path) -> Splits:
        lists = {name: self._lines(root / "labels" / f"{name}1.txt") for name in ("train", "val", "test")}
        for name, lines in lists.items():
            odd = [line for line in lines if len(Path(line).parts) != 2]
            if odd:
                self._damaged(root / "labels" / f"{name}1.txt", f"lines are not CLASS/FILE: {_listed(odd)}")
        classes = sorted({line.split("/")[0] for lines in lists.values() for line in lines})

        def files(names: list[str]) -> ImageFiles:
            return ImageFiles(names, [classes.index(name.split("/")[0]) for name in names])

        train, test = files(lists["train"] + lists["val"]), files(lists["test"])
        return self._from_files(root / "images", classes, train, test)


@dataclass(frozen=True)
class StanfordDogs(DataSet):
    """Stanford Dogs: lists in MATLAB's format, which holds arrays and no code; labels count from 1."""

    def _read(self, root: Path) -> Splits:
        parts = {name: self._list(root / f"{name}_list.mat") for name in ("train", "test")}
        folders: dict[int, str] = {}
        for name, files in parts.items():
            for file, label in zip(files.names, files.labels, strict=True):
                breed = file.split("/")[0]
                if folders.setdefault(label, breed) != breed:
                    self._damaged(
                        root / f"{name}_list.mat", f"class {label + 1} is {folders[label]} and {breed} at once"
                    )
        if sorted(folders) != list(range(len(folders))):
            self._damaged(root, f"its labels are not 1 .. {len(folders)}")
        # n02085620-Chihuahua: the part before the first hyphen is WordNet's number.
        classes = [folders[label].partition("-")[2] or folders[label] for label in range(len(folders))]
        return self._from_files(root / "Images", classes, parts["train"], parts["test"])

    def _list(self, path: Path) -> ImageFiles:
        try:
            content = scipy.io.loadmat(self._file(path), variable_names=["file_list", "labels"])
            names = [str(entry.item()) for entry in content["file_list"].ravel()]
            labels = [int(label) - 1 for label in content["labels"].ravel()]
        except FileNotFoundError:
            raise
        except Exception as error:  # the reader stumbles over damaged files with errors of every kind
            self._damaged(path, f"no file_list and labels can be read ({type(error).__name__}: {error})", error)
        if len(names) != len(labels):
            self._damaged(path, f"{len(names)} files and {len(labels)} labels")
        return ImageFiles(names, labels)


@dataclass(frozen=True)
class Cub(DataSet):
    """Caltech-UCSD Birds-200-2011 with its own split."""

    def _read(self, root: Path) -> Splits:
        tables = ("images", "image_class_labels", "train_test_split", "classes")
        names, labels, is_train, classes = (self._table(root / f"{name}.txt") for name in tables)
        for name, table in (("image_class_labels", labels), ("train_test_split", is_train)):
            if table.keys() != names.keys():
                self._damaged(root / f"{name}.txt", f"it has {len(table)} images, and images.txt other {len(names)}")
        order = list(classes)
        unknown = sorted(set(labels.values()) - set(order))
        if unknown:
            self._damaged(root / "image_class_labels.txt", f"classes.txt does not have class {_listed(unknown)}")
        odd = sorted(set(is_train.values()) - {"0", "1"})
        if odd:
            self._damaged(root / "train_test_split.txt", f"it has {_listed(odd)} in the place of 0 and 1")

        def files(flag: str) -> ImageFiles:
            chosen = [number for number in names if is_train[number] == flag]
            return ImageFiles([names[i] for i in chosen], [order.index(labels[i]) for i in chosen])

        # 001.Black_footed_Albatross
        titles = [name.partition(".")[2] or name for name in classes.values()]
        return self._from_files(root / "images", titles, files("1"), files("0"))

    def _table(self, path: Path) -> dict[str, str]:
        """The second word of every line by the first, which is a number."""
        rows = [line.split() for line in self._lines(path)]
        odd = [" ".join(row) for row in rows if len(row) != 2 or not row[0].isdigit()]
        if odd:
            self._damaged(path, f"lines are not NUMBER VALUE: {_listed(odd)}")
        table = dict(rows)
        if len(table) != len(rows):
            self._damaged(path, "numbers occur twice")
        return table


@dataclass(frozen=True)
class Caltech256(DataSet):
    """Caltech-256 with its class of clutter. It has no split of its own.

    As in the paper's released code the first images of every class, by their number, train and the others test. That
    code takes 150, so classes that have no more are never tested.

    Args:
        train_per_class (`int`): How many of a class train.
    """

    train_per_class: int = 150

    def _read(self, root: Path) -> Splits:
        # Sorted by their number: 001.ak47 .. 257.clutter. Stray files and folders lie among the images.
        folders = sorted(path for path in root.iterdir() if path.is_dir() and re.fullmatch(r"\d{3}\..+", path.name))
        if not folders:
            raise FileNotFoundError(f"{self.title}: {root} has no folders such as 001.ak47. {self._where()}")
        train, test = ImageFiles(), ImageFiles()
        for label, folder in enumerate(folders):
            pattern = re.compile(rf"{folder.name[:3]}_\d{{4}}\.jpg")
            files = sorted(path.name for path in folder.iterdir() if path.is_file() and pattern.fullmatch(path.name))
            for position, name in enumerate(files):
                part = train if position < self.train_per_class else test
                part.names.append(f"{folder.name}/{name}")
                part.labels.append(label)
        if not test.names:
            self._damaged(root, f"no class has more than {self.train_per_class} images named CLASS_NUMBER.jpg")
        return self._from_files(root, [folder.name.partition(".")[2] for folder in folders], train, test)


DATA_SETS: dict[str, DataSet] = {
    data_set.key: data_set
    for data_set in (
        Cifar(
            *("cifar10", "CIFAR-10", "https://www.cs.toronto.edu/~kriz/cifar.html", "cifar-10-batches-bin"),
            *(10, 60_000, 50_000, 10_000),
            train_files=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
            test_files=("test_batch.bin",),
            names_file="batches.meta.txt",
        ),
        Cifar(
            *("cifar100", "CIFAR-100", "https://www.cs.toronto.edu/~kriz/cifar.html", "cifar-100-binary"),
            *(100, 60_000, 50_000, 10_000),
            train_files=("train.bin",),
            test_files=("test.bin",),
            names_file="fine_label_names.txt",
            label_bytes=2,
        ),
        Dtd("dtd", "DTD-57", "https://www.robots.ox.ac.uk/~vgg/data/dtd/", "dtd", 47, 5_640, 3_760, 1_880),
        StanfordDogs(
            *("dogs", "DOG-120", "http://vision.stanford.edu/aditya86/ImageNetDogs/", "stanford-dogs"),
            *(120, 20_580, 12_000, 8_580),
        ),
        Cub(
            *("cub", "CUB-200", "https://www.vision.caltech.edu/datasets/cub_200_2011/", "CUB_200_2011"),
            *(200, 11_788, 5_994, 5_794),
        ),
        Caltech256(
            *("caltech256", "Caltech-256", "https://data.caltech.edu/records/nyy15-4j048", "256_ObjectCategories"),
            *(257, 30_607, None, None),
        ),
    )
}


def _labels(part: Any) -> list[int]:
    return part.targets if isinstance(part, ArrayImages) else part.with_format("arrow")["label"].to_pylist()


def _class_names(part: Any) -> list[str]:
    return part.classes if isinstance(part, ArrayImages) else part.features["label"].names


def _listed(names: Sequence[Any]) -> str:
    shown = ", ".join(str(name)[:80] for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
