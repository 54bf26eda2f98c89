"""Folders of images, by class or without classes."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image
from PIL import features as pil_features
from torchvision.datasets import ImageFolder

from .images import decode_file


logger = logging.getLogger(__name__)

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}

# Extensions of pictures in folders, as far as the decoder is there: AVIF depends on how Pillow was built, and the last
# two on pillow-heif. Multi-page documents, icons, drawings and video are none.
_PICTURES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".tga", ".avif", ".heic", ".heif"),
)
# Files that usually lie beside images and are not taken for any.
_SIDE_FILES = {".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".db", ".ini"}


class ClassFolder(ImageFolder):
    """A folder with one sub-folder of images a class; class indices follow the sorted names.

    With `labelled=False`: a folder of images, in it or in sub-folders of any depth, all of which have the label 0.

    Hidden files and folders are ignored, and files that describe images (.txt, .json, .csv and the like). Other files
    whose extension is not one of [`image_extensions`] are passed over with a warning. Items are
    `(PIL image, class index)`; of an animation, the first frame.

    Raises:
        FileNotFoundError: If the folder, its sub-folders or their images are missing.
        ValueError: If the sub-folders are splits (train, test) and not classes.
    """

    def __init__(self, root: str | Path, labelled: bool = True) -> None:
        self._labelled = labelled
        root = Path(root).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(
                f"There is no folder {str(root)!r}. A data set of the Hub is loaded with `datasets.load_dataset(...)`."
            )
        extensions, passed_over = image_extensions(), []

        def is_image(name: str) -> bool:
            path = Path(name).relative_to(root)
            if any(part.startswith(".") for part in path.parts):
                return False
            if path.suffix.lower() not in (*extensions, *_SIDE_FILES):
                passed_over.append(str(path))
            return path.suffix.lower() in extensions

        super().__init__(root, is_valid_file=is_image, allow_empty=True)
        read = f"Extensions read: {', '.join(extensions)}."
        filled = set(self.targets)
        empty = [name for name, index in self.class_to_idx.items() if index not in filled]
        if not filled:
            where = f"The sub-folders of {str(root)!r} ({shorten(self.classes)}) contain"
            raise FileNotFoundError(
                f"{where if labelled else f'The folder {str(root)!r} contains'} no images. {read}"
                + (f" Other files: {shorten(passed_over, 5)}." if passed_over else "")
            )
        if passed_over:
            logger.warning(
                "%d files of %s have other extensions than images and are not read: %s. %s Rename or convert them if "
                "they are images; .heic and .heif need pillow-heif and its `register_heif_opener()`.",
                len(passed_over),
                root,
                shorten(passed_over, 5),
                read,
            )
        if empty:
            logger.warning("No images for %s of %s: %s.", "class" if len(empty) == 1 else "classes", root, empty)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes = sorted(x.name for x in Path(directory).iterdir() if x.is_dir() and not x.name.startswith("."))
        if not classes and self._labelled:
            raise FileNotFoundError(f"The folder {str(directory)!r} has no sub-folders: it needs one for each class.")
        if classes and {name.lower() for name in classes} <= _SPLIT_NAMES:
            raise ValueError(
                f"The sub-folders of {str(directory)!r} are splits and not classes: {', '.join(classes)}. "
                f"Choose one, for instance {str(Path(directory) / classes[-1])!r}."
            )
        if not self._labelled:
            # All that lies below the folder itself is one class.
            return [""], {"": 0}
        return classes, {name: index for index, name in enumerate(classes)}

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return decode_file(path), label


def image_extensions() -> tuple[str, ...]:
    """Extensions of the files that a folder of images is read from: those that PIL has a decoder for now."""
    formats = Image.registered_extensions()
    known = (extension for extension in _PICTURES if formats.get(extension) in Image.OPEN)
    # Pillow registers these two whether it was built with their decoders or not.
    optional = {".avif": "avif", ".webp": "webp"}
    return tuple(
        extension for extension in known if extension not in optional or pil_features.check(optional[extension])
    )


def shorten(names: list[str], limit: int = 10) -> str:
    """The first of some names, for a message."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
