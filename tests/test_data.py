"""Data sets of every kind to pixels in [0, 1], labels, splits and their checks."""

import io
import itertools
import logging
import pickle
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split
from torchvision.datasets import FakeData

from autolora_hf.data import (
    BrokenImageError,
    PixelDataset,
    PixelTransform,
    as_pixel_dataset,
    check_labels,
    collate,
    load_source,
    same_data,
    stratified_split,
    stratified_subset,
    to_rgb,
)
from autolora_hf.data.folders import image_extensions
from autolora_hf.pixels import Preprocessing


PREPROCESSING = Preprocessing((8, 8), crop_pct=1.0)
NAMES = ["cat", "dog", "fox"]


def picture(seed, size=(8, 8)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def arrow(n=12, image="image", label="label", extra=None, seed=0):
    columns = {image: [picture(seed + i) for i in range(n)], label: [i % 3 for i in range(n)]}
    features = {image: datasets.Image(), label: datasets.ClassLabel(names=NAMES)}
    for name, (values, feature) in (extra or {}).items():
        columns[name], features[name] = values, feature
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def folder(root, per_class=3, names=NAMES, seed=0):
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            picture(seed + 10 * k + i).save(root / name / f"{i}.png")
    return root


class Pairs(Dataset):
    """A map-style data set of what it is given."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def exact(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def assert_item(item, label):
    assert item["pixel_values"].shape == (3, 8, 8)
    assert item["pixel_values"].dtype == torch.float32
    assert 0 <= item["pixel_values"].min() <= item["pixel_values"].max() <= 1
    assert type(item["labels"]) is int
    assert item["labels"] == label


# --- datasets.Dataset ------------------------------------------------------------------------------------------------


def test_arrow_dataset():
    data = as_pixel_dataset(arrow(), PREPROCESSING, name="train")
    assert isinstance(data, PixelDataset)
    assert (len(data), data.name, data.num_classes, data.class_names) == (12, "train", 3, NAMES)
    assert data.labels == [i % 3 for i in range(12)]
    for i in (0, 5, 11, -1):
        assert_item(data[i], i % 12 % 3)
        torch.testing.assert_close(data[i]["pixel_values"], exact(picture(i % 12)))
    with pytest.raises(IndexError):
        data[12]
    assert len(list(data)) == 12


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas", None])
def test_format_of_a_dataset_does_not_matter(kind):
    data = as_pixel_dataset(arrow().with_format(kind), PREPROCESSING)
    assert_item(data[4], 1)
    torch.testing.assert_close(data[4]["pixel_values"], exact(picture(4)))


def test_selected_and_shuffled_datasets_keep_images_and_labels_together():
    source = arrow().shuffle(seed=1).select([7, 2, 2, 5])
    data = as_pixel_dataset(source, PREPROCESSING)
    assert data.labels == [data[i]["labels"] for i in range(4)] == source["label"][:]


@pytest.mark.parametrize(
    ("image", "label"), [("img", "labels"), ("photo_of_it", "species"), ("pixel_values", "label")]
)
def test_columns_are_found_by_type(image, label):
    data = as_pixel_dataset(arrow(image=image, label=label), PREPROCESSING)
    assert_item(data[1], 1)


def test_columns_are_found_by_name_where_types_do_not_tell():
    arrays = [np.full((8, 8, 3), i, np.uint8) for i in range(4)]
    nested = datasets.List(datasets.List(datasets.List(datasets.Value("uint8"))))
    for feature in (datasets.Array3D((8, 8, 3), "uint8"), nested):
        source = datasets.Dataset.from_dict(
            {"img": arrays, "labels": [0, 1, 0, 400], "path": list("abcd")},
            features=datasets.Features(
                {"img": feature, "labels": datasets.Value("int64"), "path": datasets.Value("string")}
            ),
        )
        data = as_pixel_dataset(source, PREPROCESSING)
        assert_item(data[3], 400)
        assert torch.equal(data[3]["pixel_values"], torch.full((3, 8, 8), 3 / 255))
        assert (data.class_names, data.num_classes) == (None, 401)


def test_float_arrays_in_a_dataset_are_tensors():
    source = datasets.Dataset.from_dict(
        {"pixel_values": np.full((2, 3, 8, 8), 0.25, np.float32), "label": [0, 1]},
        features=datasets.Features(
            {"pixel_values": datasets.Array3D((3, 8, 8), "float32"), "label": datasets.Value("int32")}
        ),
    )
    assert torch.equal(as_pixel_dataset(source, PREPROCESSING)[1]["pixel_values"], torch.full((3, 8, 8), 0.25))


def test_undecoded_images_are_decoded():
    source = arrow().cast_column("image", datasets.Image(decode=False))
    torch.testing.assert_close(as_pixel_dataset(source, PREPROCESSING)[2]["pixel_values"], exact(picture(2)))


def test_a_transform_of_the_dataset_is_respected():
    def invert(batch):
        return {"image": [1 - exact(image) for image in batch["image"]], "label": batch["label"]}

    data = as_pixel_dataset(arrow().with_transform(invert), PREPROCESSING)
    torch.testing.assert_close(data[2]["pixel_values"], 1 - exact(picture(2)))
    assert data.labels == [i % 3 for i in range(12)]
    assert data.class_names == NAMES


TWO_IMAGES = {"mask": ([picture(i) for i in range(12)], datasets.Image())}
TWO_LABELS = {"coarse": ([0] * 12, datasets.ClassLabel(names=["animal", "plant"]))}


@pytest.mark.parametrize(
    ("source", "arguments", "messages"),
    [
        (arrow(extra=TWO_IMAGES), {}, ["several columns that may be the image: image, mask", "`image_column=`"]),
        (arrow(extra=TWO_LABELS), {}, ["several columns that may be the label: label, coarse", "`label_column=`"]),
        (arrow().remove_columns("image"), {}, ["no image column", "label (ClassLabel)", "`image_column=`"]),
        (arrow().remove_columns("label"), {}, ["no label column", "image (Image)", "`label_column=`"]),
        (arrow(), {"image_column": "photo"}, ["`image_column='photo'` is not a column", "image (Image), label (Cl"]),
        (arrow(), {"label_column": "y"}, ["`label_column='y'` is not a column"]),
    ],
)
def test_missing_and_ambiguous_columns(source, arguments, messages):
    with pytest.raises(ValueError) as error:
        as_pixel_dataset(source, PREPROCESSING, **arguments)
    for message in messages:
        assert message in str(error.value)


def test_ambiguous_columns_can_be_named():
    source = arrow(extra=TWO_IMAGES | TWO_LABELS)
    data = as_pixel_dataset(source, PREPROCESSING, image_column="mask", label_column="coarse")
    assert data.class_names == ["animal", "plant"]
    assert set(data.labels) == {0}


@pytest.mark.parametrize("labels", [list("abcd"), [0.5, 1.0, 2.0, 3.0], [True, False, True, False], [0, None, 1, 2]])
def test_labels_that_are_no_integers(labels):
    source = datasets.Dataset.from_dict({"image": [picture(i) for i in range(4)], "label": labels})
    source = source.cast_column("image", datasets.Image())
    data = as_pixel_dataset(source, PREPROCESSING)
    with pytest.raises(TypeError, match=r"`label\[\d\]` must be an integer class index"):
        _ = data.labels
    with pytest.raises(TypeError, match=r"`label\[1\] of dataset` must be an integer class index"):
        _ = data[1]
    if isinstance(labels[0], str):
        with pytest.raises(TypeError, match="class_encode_column"):
            _ = data.labels


def test_labels_are_read_without_decoding_images():
    source = arrow().cast_column("image", datasets.Image(decode=False))
    broken = source.map(lambda row: {"image": {"bytes": b"no image", "path": None}})
    data = as_pixel_dataset(broken.cast_column("image", datasets.Image()), PREPROCESSING, name="train")
    assert data.labels == [i % 3 for i in range(12)]
    with pytest.raises(ValueError, match=r"`image\[3\] of train` cannot be read"):
        _ = data[3]


def test_missing_image_is_named():
    source = datasets.Dataset.from_dict(
        {"image": [picture(0), None], "label": [0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    with pytest.raises(BrokenImageError, match=r"`image\[1\] of val` cannot be read: there is no image \(null\)"):
        _ = as_pixel_dataset(source, PREPROCESSING, name="val")[1]


# --- What is refused -------------------------------------------------------------------------------------------------


def test_dataset_dict_is_refused_with_its_splits():
    source = datasets.DatasetDict(train=arrow(), test=arrow())
    with pytest.raises(ValueError, match=r"DatasetDict with the splits train, test: pick one"):
        as_pixel_dataset(source, PREPROCESSING)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(picture(0), 0)])


@pytest.mark.parametrize("stream", [arrow().to_iterable_dataset(), Stream()], ids=["datasets", "torch"])
def test_streams_are_refused(stream):
    with pytest.raises(TypeError, match=r"Got a stream .*`as_pixel_stream`.*without `streaming=True`.*from_list"):
        as_pixel_dataset(stream, PREPROCESSING)


def test_the_first_samples_of_a_stream_are_had_as_the_message_says():
    stream = arrow().to_iterable_dataset()
    kept = datasets.Dataset.from_list(list(stream.take(2)), features=stream.features)
    found, expected = (as_pixel_dataset(data, PREPROCESSING) for data in (kept, arrow()))
    assert len(as_pixel_dataset(list(itertools.islice(Stream(), 1)), PREPROCESSING)) == 1
    assert torch.equal(found[1]["pixel_values"], expected[1]["pixel_values"])
    assert (found.labels, found.class_names) == (expected.labels[:2], expected.class_names)


def test_other_sources_are_refused():
    with pytest.raises(TypeError, match=r"`source` must be .* got int"):
        as_pixel_dataset(3, PREPROCESSING)
    with pytest.raises(TypeError, match="pairs"):
        as_pixel_dataset(Pairs([picture(0)]), PREPROCESSING)
    with pytest.raises(TypeError, match="tuple of 3"):
        as_pixel_dataset(Pairs([(picture(0), 0, "id")]), PREPROCESSING)
    with pytest.raises(ValueError, match="no label column"):
        as_pixel_dataset(Pairs([{"image": picture(0), "target": 0}]), PREPROCESSING)


@pytest.mark.parametrize("source", [Pairs([]), arrow().select([])])
def test_empty_sources_are_refused(source):
    with pytest.raises(ValueError, match="val is empty"):
        as_pixel_dataset(source, PREPROCESSING, name="val")


def test_pixel_dataset_is_returned_as_it_is_unless_it_has_another_geometry():
    data = as_pixel_dataset(arrow(), PREPROCESSING, name="train", augmentation="crop")
    same_geometry = Preprocessing((8, 8), mean=(0.5,) * 3, crop_pct=1.0)
    assert as_pixel_dataset(data, same_geometry) is data
    with pytest.raises(ValueError, match=r"train was made for .*\(8, 8\).*\(16, 16\).* is needed"):
        as_pixel_dataset(data, Preprocessing((16, 16)))


def test_unknown_augmentation():
    with pytest.raises(ValueError, match="'none', 'crop', 'crop-flip', 'wide-crop-flip', got 'flip'"):
        as_pixel_dataset(arrow(), PREPROCESSING, augmentation="flip")


# --- Folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, Path])
def test_folder(tmp_path, kind):
    folder(tmp_path / "data", names=["fox", "cat", "dog"])
    data = as_pixel_dataset(kind(tmp_path / "data"), PREPROCESSING)
    assert data.class_names == NAMES
    assert data.labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert_item(data[4], 1)
    torch.testing.assert_close(data[0]["pixel_values"], exact(picture(10)))


def test_hidden_files_and_folders_are_ignored(tmp_path):
    root = folder(tmp_path)
    (root / ".cache").mkdir()
    picture(0).save(root / ".cache" / "0.png")
    (root / "cat" / "._0.png").write_bytes(b"resource fork")
    (root / "cat" / ".thumbnails").mkdir()
    picture(0).save(root / "cat" / ".thumbnails" / "0.png")
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "README.md").write_text("three animals")
    data = as_pixel_dataset(root, PREPROCESSING)
    assert data.class_names == NAMES
    assert len(data) == 9


def test_hidden_parents_of_the_folder_do_not_matter(tmp_path):
    assert len(as_pixel_dataset(folder(tmp_path / ".data" / "animals"), PREPROCESSING)) == 9


def test_folder_without_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing.*load_dataset"):
        as_pixel_dataset(tmp_path / "missing", PREPROCESSING)
    picture(0).save(tmp_path / "0.png")
    with pytest.raises(FileNotFoundError, match="has no sub-folders: it needs one for each class"):
        as_pixel_dataset(tmp_path, PREPROCESSING)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"\(cat\) contain no images"):
        as_pixel_dataset(tmp_path, PREPROCESSING)


def test_folder_of_splits_is_not_taken_for_classes(tmp_path):
    folder(tmp_path / "train")
    folder(tmp_path / "Test")
    with pytest.raises(ValueError, match=r"splits and not classes: Test, train"):
        as_pixel_dataset(tmp_path, PREPROCESSING)


def test_empty_class_is_mentioned(tmp_path, caplog):
    folder(tmp_path)
    (tmp_path / "emu").mkdir()
    with caplog.at_level(logging.WARNING):
        data = as_pixel_dataset(tmp_path, PREPROCESSING)
    assert "emu" in caplog.text
    assert data.num_classes == 4
    assert Counter(data.labels) == {0: 3, 1: 3, 3: 3}


def test_broken_files_are_named_when_hit(tmp_path):
    folder(tmp_path)
    whole = (tmp_path / "dog" / "1.png").read_bytes()
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    (tmp_path / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    data = as_pixel_dataset(tmp_path, PREPROCESSING, name="train")
    assert len(data) == 9
    assert_item(data[0], 0)
    for index, name in ((1, "cat/1.png"), (4, "dog/1.png")):
        with pytest.raises(ValueError) as error:
            _ = data[index]
        assert f"`image[{index}] of train` cannot be read" in str(error.value)
        assert str(tmp_path / name) in str(error.value)


# --- Torch data sets -------------------------------------------------------------------------------------------------


def test_pairs_of_pictures_tensors_and_arrays():
    image = picture(0)
    items = [(image, 0), (exact(image), torch.tensor(1)), (np.asarray(image), np.int64(2)), [exact(image).numpy(), 3]]
    data = as_pixel_dataset(Pairs(items), PREPROCESSING)
    assert data.labels == [0, 1, 2, 3]
    assert data.num_classes == 4
    for i in range(4):
        assert_item(data[i], i)
        torch.testing.assert_close(data[i]["pixel_values"], exact(image))


def test_dictionaries():
    data = as_pixel_dataset(Pairs([{"img": picture(i), "labels": i % 2, "id": "x"} for i in range(4)]), PREPROCESSING)
    assert data.labels == [0, 1, 0, 1]
    named = as_pixel_dataset(Pairs([{"a": picture(0), "b": 5}]), PREPROCESSING, image_column="a", label_column="b")
    assert_item(named[0], 5)


def test_tensor_dataset_and_torchvision():
    pixels, labels = torch.rand(5, 3, 8, 8), torch.tensor([0, 1, 2, 1, 0])
    data = as_pixel_dataset(TensorDataset(pixels, labels), PREPROCESSING)
    assert data.labels == labels.tolist()
    torch.testing.assert_close(data[3]["pixel_values"], pixels[3])
    fake = as_pixel_dataset(FakeData(4, (3, 20, 30), num_classes=3), PREPROCESSING)
    assert fake.labels == [fake[i]["labels"] for i in range(4)]


class Labelled(Pairs):
    """Counts the reads of items."""

    classes = ("even", "odd")

    def __init__(self, n=50, targets=None, target_transform=None, first=0):
        super().__init__([(picture(first + i), i % 2) for i in range(n)])
        self.targets = torch.tensor([i % 2 for i in range(n)]) if targets is None else targets
        self.target_transform = target_transform
        self.reads = 0

    def __getitem__(self, index):
        self.reads += 1
        image, label = super().__getitem__(index)
        return image, self.target_transform(label) if self.target_transform else label


def test_stored_labels_spare_reading_the_images():
    source = Labelled()
    data = as_pixel_dataset(Subset(source, range(0, 50, 3)), PREPROCESSING)
    assert data.labels == [i % 2 for i in range(0, 50, 3)]
    assert data.class_names == ["even", "odd"]
    assert source.reads <= 3
    both = as_pixel_dataset(ConcatDataset([source, Labelled()]), PREPROCESSING)
    assert both.labels == [i % 2 for i in range(50)] * 2
    assert both.class_names == ["even", "odd"]


@pytest.mark.parametrize(
    "source",
    [
        Labelled(6, target_transform=lambda label: 1 - label),
        Labelled(6, targets=["one", "two", "three", "four", "five", "six"]),
        Labelled(6, targets=[1, 0, 0, 0, 0, 0]),
        Labelled(6, targets=[0, 1]),
    ],
    ids=["transformed", "names", "other labels", "other length"],
)
def test_stored_labels_that_are_not_those_of_the_items_are_not_used(source):
    data = as_pixel_dataset(source, PREPROCESSING)
    assert data.labels == [data[i]["labels"] for i in range(6)]


def test_random_split_of_a_datasets_dataset():
    first, second = random_split(arrow(), [8, 4], generator=torch.Generator().manual_seed(0))
    data = as_pixel_dataset(first, PREPROCESSING)
    assert data.labels == [data[i]["labels"] for i in range(8)]
    assert data.class_names == NAMES
    assert not same_data(data, as_pixel_dataset(second, PREPROCESSING))


# --- Images ----------------------------------------------------------------------------------------------------------


def colours(image):
    return [tuple(int(v) for v in image.getpixel((x, 0))) for x in range(image.width)]


def test_grey_palette_and_bilevel_images_become_rgb():
    grey = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    expected = [(0, 0, 0), (100, 100, 100), (255, 255, 255)]
    assert colours(to_rgb(grey)) == expected
    assert colours(to_rgb(grey.convert("P"))) == expected
    assert colours(to_rgb(grey.convert("LA"))) == expected
    assert colours(to_rgb(Image.fromarray(np.array([[True, False]])))) == [(255,) * 3, (0,) * 3]
    assert to_rgb(picture(0).convert("CMYK")).mode == "RGB"


def test_sixteen_bit_images_are_scaled_and_not_clipped():
    values = np.array([[0, 257, 25700, 65535]], np.uint16)
    expected = [(v,) * 3 for v in (0, 1, 100, 255)]
    assert colours(to_rgb(Image.fromarray(values))) == expected
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    assert colours(to_rgb(Image.open(buffer))) == expected
    assert colours(to_rgb(Image.fromarray(values.astype(np.int32)))) == expected


def test_transparent_images_are_blended_onto_white():
    rgba = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8))
    assert colours(to_rgb(rgba)) == [(200, 0, 0), (255, 255, 255), (204, 204, 204)]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.info["transparency"] = 0
    assert colours(to_rgb(palette))[0] == (255, 255, 255)


def test_float_images_are_refused():
    with pytest.raises(ValueError, match=r"`x-ray` is a float image .* from 0 to 3000"):
        to_rgb(Image.fromarray(np.array([[0, 3000]], np.float32)), "x-ray")


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # stored lying on its side
    buffer = io.BytesIO()
    image.save(buffer, "png", exif=exif)
    assert to_rgb(Image.open(buffer)).size == (1, 2)


def test_large_pictures_are_resized():
    transform = PixelTransform(Preprocessing((8, 16), crop_pct=0.5))
    assert transform(picture(0, (50, 40))).shape == (3, 8, 16)
    assert transform(np.asarray(picture(0, (50, 40)))).shape == (3, 8, 16)


def test_arrays_and_tensors():
    transform = PixelTransform(PREPROCESSING)
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    expected = (torch.from_numpy(grey).float() / 255).expand(3, 8, 8)
    for image in (grey, grey[..., None], expected[:1], expected[:1].double(), expected.numpy()):
        torch.testing.assert_close(transform(image), expected)
    rgba = np.dstack([np.asarray(picture(0)), np.full((8, 8), 255, np.uint8)])
    torch.testing.assert_close(transform(rgba), exact(picture(0)))
    half = torch.linspace(0, 1, 192).view(3, 8, 8).half()
    assert transform(half).dtype == torch.float32


def test_the_given_tensor_is_neither_changed_nor_shared():
    pixels = torch.rand(3, 8, 8)
    original = pixels.clone()
    made = PixelTransform(PREPROCESSING)(pixels)
    made.zero_()
    assert torch.equal(pixels, original)


def with_nan():
    pixels = torch.rand(3, 8, 8)
    pixels[0, 0, 0] = float("nan")
    return pixels


@pytest.mark.parametrize(
    ("image", "error", "messages"),
    [
        (torch.arange(192, dtype=torch.uint8).view(3, 8, 8), TypeError, ["uint8", "from 0 to 191", "/ 255"]),
        (torch.zeros(3, 8, 8, dtype=torch.long), TypeError, ["int64"]),
        (torch.linspace(-2, 2, 192).view(3, 8, 8), ValueError, ["from -2 to 2", "normalised"]),
        (torch.linspace(0, 255, 192).view(3, 8, 8), ValueError, ["from 0 to 255", "divide by 255"]),
        (with_nan(), ValueError, ["NaN", "1 of 192"]),
        (torch.rand(3, 8, 9), ValueError, ["8 x 8", "8 x 9"]),
        (torch.rand(4, 8, 8), ValueError, ["(4, 8, 8)", "fourth channel"]),
        (torch.rand(8, 8, 3), ValueError, ["(8, 8, 3)", "3 x H x W"]),
        (torch.rand(8, 8), ValueError, ["(8, 8)"]),
        (np.zeros((3, 8, 8), np.uint8), ValueError, ["uint8 array H x W", "(3, 8, 8)"]),
        (np.zeros((8, 8, 3), np.int64), TypeError, ["int64"]),
        ("cat.png", TypeError, ["PIL image", "got str"]),
    ],
)
def test_wrong_images_are_refused_by_name(image, error, messages):
    data = as_pixel_dataset(Pairs([(picture(0), 0), (image, 1)]), PREPROCESSING, name="train")
    with pytest.raises(error) as raised:
        _ = data.select([1])[0]
    for message in ["`image[1] of train`", *messages]:
        assert message in str(raised.value)


# --- Augmentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 32, 64, 96])
@pytest.mark.parametrize("augmentation", ["crop", "crop-flip", "wide-crop-flip"])
@pytest.mark.parametrize("kind", ["picture", "tensor"])
def test_augmentation_is_random_seeded_and_in_range(size, augmentation, kind):
    transform = PixelTransform(Preprocessing((size, size), crop_pct=1.0), augmentation)
    image = picture(0, (size, size))
    image = exact(image) if kind == "tensor" else image
    runs = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        runs.append(transform(image))
        assert runs[-1].shape == (3, size, size)
        assert runs[-1].dtype == torch.float32
        assert 0 <= runs[-1].min() <= runs[-1].max() <= 1
    assert torch.equal(runs[0], runs[1])
    assert any(not torch.equal(runs[0], run) for run in runs[2:])


def test_evaluation_is_deterministic_and_draws_nothing():
    state = torch.get_rng_state()
    transform = PixelTransform(PREPROCESSING)
    assert torch.equal(transform(picture(0, (20, 30))), transform(picture(0, (20, 30))))
    assert torch.equal(torch.get_rng_state(), state)


def test_crop_only_shifts_by_an_eighth_and_repeats_the_border():
    ramp = torch.arange(32.0).expand(3, 32, 32) / 31
    transform = PixelTransform(Preprocessing((32, 32)), "crop")
    shifts = set()
    for seed in range(60):
        torch.manual_seed(seed)
        made = transform(ramp)
        shift = round((made[0, 0, 16] * 31).item()) - 16
        assert torch.equal(made, (torch.arange(32.0) + shift).clamp(0, 31).expand(3, 32, 32) / 31)
        shifts.add(shift)
    assert shifts == set(range(-4, 5))


def test_crop_flip_mirrors_half_of_the_images():
    ramp = torch.arange(32.0).expand(3, 32, 32) / 31
    for size, image in ((32, ramp), (96, torch.arange(96.0).expand(3, 96, 96) / 95)):
        transform = PixelTransform(Preprocessing((size, size)), "crop-flip")
        torch.manual_seed(0)
        middle = slice(size // 4, size // 2)
        mirrored = [(transform(image)[0, size // 2].diff()[middle] < 0).all().item() for _ in range(100)]
        assert 30 < sum(mirrored) < 70


def test_crop_of_photos_keeps_most_of_the_original():
    image = Image.fromarray(np.tile(np.linspace(0, 255, 400).astype(np.uint8)[None, :, None], (400, 1, 3)))
    transform = PixelTransform(Preprocessing((96, 96)), "crop-flip")
    torch.manual_seed(0)
    ranges = [(made[0].max() - made[0].min()).item() for made in (transform(image) for _ in range(50))]
    # The narrowest crop of 70 % of the area has an aspect ratio of 3 to 4.
    assert min(ranges) > 0.68
    assert max(ranges) - min(ranges) > 0.1


def test_wide_crop_of_photos_shows_small_parts_too():
    image = Image.fromarray(np.tile(np.linspace(0, 255, 400).astype(np.uint8)[None, :, None], (400, 1, 3)))
    transform = PixelTransform(Preprocessing((96, 96)), "wide-crop-flip")
    torch.manual_seed(0)
    ranges = [(made[0].max() - made[0].min()).item() for made in (transform(image) for _ in range(50))]
    assert min(ranges) < 0.5 < max(ranges)


# --- PixelDataset ----------------------------------------------------------------------------------------------------


def test_select_is_a_view_with_another_augmentation():
    data = as_pixel_dataset(arrow(), PREPROCESSING, augmentation="crop", name="train")
    view = data.select([9, 4, 7], augmentation="none")
    assert (len(view), view.labels, view.name, view.num_classes) == (3, [0, 1, 1], "train", 3)
    assert (data.augmentation, view.augmentation, data.select([0]).augmentation) == ("crop", "none", "crop")
    torch.testing.assert_close(view[1]["pixel_values"], exact(picture(4)))
    torch.testing.assert_close(view.select([2])[0]["pixel_values"], exact(picture(7)))
    assert len(data.select([])) == 0
    for wrong in ([12], [-1]):
        with pytest.raises(IndexError, match=r"Indices of train must be in 0 .. 11"):
            data.select(wrong)


@pytest.mark.parametrize("kind", ["arrow", "folder", "torch"])
def test_pickles_and_loads_in_worker_processes(kind, tmp_path):
    sources = {
        "arrow": arrow,
        "folder": lambda: folder(tmp_path),
        "torch": lambda: Pairs([(picture(i), i % 3) for i in range(9)]),
    }
    data = as_pixel_dataset(sources[kind](), PREPROCESSING, augmentation="crop-flip")
    copied = pickle.loads(pickle.dumps(data))
    assert copied.labels == data.labels
    assert_item(copied[0], data.labels[0])


def test_data_loader_with_workers():
    data = as_pixel_dataset(arrow(), PREPROCESSING)
    loader = DataLoader(data, batch_size=5, num_workers=1, collate_fn=collate)
    batches = list(loader)
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == data.labels
    wrong = as_pixel_dataset(Pairs([(picture(0), 0), (torch.full((3, 8, 8), 7.0), 0)]), PREPROCESSING, name="train")
    with pytest.raises(ValueError, match=r"image\[1\] of train.*divide by 255"):
        list(DataLoader(wrong, batch_size=2, num_workers=1, collate_fn=collate))


def test_collate():
    data = as_pixel_dataset(arrow(), PREPROCESSING)
    batch = collate([data[i] for i in range(4)])
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].tolist() == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="`pixel_values` must be in"):
        collate([{"pixel_values": torch.full((3, 8, 8), 2.0), "labels": 0}])


# --- same_data -------------------------------------------------------------------------------------------------------


def pixel(source):
    return as_pixel_dataset(source, PREPROCESSING)


def test_same_data_of_one_pixel_dataset():
    data = pixel(arrow())
    kept, held_out = (data.select(indices) for indices in stratified_split(data.labels, 0.25, 0))
    assert same_data(data, data)
    assert same_data(data, held_out)
    assert not same_data(kept, held_out)
    assert same_data(kept, data.select([*range(12)][:1]).select([0])) == (
        0 in stratified_split(data.labels, 0.25, 0)[0]
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda source: source, True),
        (lambda source: source.select(range(3, 6)), True),
        (lambda source: source.shuffle(seed=0), True),
        (lambda source: source.rename_column("image", "img"), True),
        (lambda source: source.add_column("id", list(range(12))), True),
        (lambda source: source.with_format("torch"), True),
        (lambda source: Subset(source, [3]), True),
        (lambda source: datasets.concatenate_datasets([arrow(seed=50), source.select([5])]), True),
        (lambda source: ConcatDataset([arrow(seed=50), Subset(source, [2])]), True),
        (lambda source: arrow(), True),  # equal content gives an equal fingerprint
        (lambda source: arrow(seed=50), False),
        (lambda source: Pairs([(picture(0), 0)]), True),  # the same pixels
        (lambda source: Pairs([(picture(50), 0)]), False),
    ],
)
def test_same_data_of_a_dataset_and_what_is_made_of_it(change, expected):
    source = arrow()
    assert same_data(pixel(source), pixel(change(source))) is expected
    assert same_data(pixel(change(source)), pixel(source)) is expected


def test_same_data_of_disjoint_selections():
    source = arrow()
    parts = source.train_test_split(0.25, seed=0)
    assert not same_data(pixel(parts["train"]), pixel(parts["test"]))
    assert not same_data(pixel(source.select(range(6))), pixel(source.select(range(6, 12))))
    assert not same_data(pixel(source.select(range(6))), pixel(source.select([7, 11, 9])))
    assert same_data(pixel(source.select(range(7))), pixel(source.select([7, 11, 6])))
    assert not same_data(pixel(Subset(source, [0, 1])), pixel(source.select([2, 3])))


def test_same_data_of_saved_datasets(tmp_path):
    arrow(30).save_to_disk(tmp_path / "saved", num_shards=3)
    first, second = (datasets.load_from_disk(str(tmp_path / "saved")) for _ in range(2))
    assert same_data(pixel(first), pixel(second))
    assert same_data(pixel(first.select(range(5, 25))), pixel(first.select([24])))
    assert not same_data(pixel(first.select(range(5, 24))), pixel(first.select([24, 3, 29])))


def test_same_data_of_folders(tmp_path):
    one, other = folder(tmp_path / "one"), folder(tmp_path / "other", seed=500)
    assert same_data(pixel(one), pixel(str(tmp_path / "other" / ".." / "one")))
    assert not same_data(pixel(one), pixel(other))


def test_same_data_of_torch_datasets():
    source = Labelled(6)
    assert same_data(pixel(source), pixel(Subset(Subset(source, [4, 5]), [1])))
    assert not same_data(pixel(Subset(source, [0, 1])), pixel(Subset(source, [2, 3])))
    assert not same_data(pixel(source), pixel(Labelled(6, first=50)))
    both = ConcatDataset([source, Labelled(6, first=50)])
    assert same_data(pixel(Subset(both, [5])), pixel(source))
    assert not same_data(pixel(Subset(both, [6])), pixel(source))
    view = pixel(source)
    assert same_data(pixel(Subset(view, [2])), view.select([2, 3]))
    assert not same_data(pixel(Subset(view, [2])), view.select([3]))


# --- Labels and splits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "messages"),
    [
        ([], ["train has no samples"]),
        ([0, 1, 3, 3, 7], ["3 of 5 labels of train are outside 0 .. 2", "3 (2 x), 7 (1 x)", "num_classes=8"]),
        ([-1, 0, 1, -1], ["2 of 4 labels", "-1 (2 x)", "hidden"]),
        ([0, 1.0, 2], ["1 of 3 labels of train are not integers", "1.0"]),
        (["cat", "dog"], ["2 of 2 labels", "'cat'", "class_encode_column"]),
        ([True, False], ["not integers"]),
        ([2, 2, 2], ["All 3 samples of train have label 2"]),
        ([1, *range(100, 130)], ["30 of 31", "100 (1 x)", "and 20 more"]),
    ],
)
def test_wrong_labels(labels, messages):
    with pytest.raises(ValueError) as error:
        check_labels(labels, 3, "train")
    for message in messages:
        assert message in str(error.value)


def test_right_labels():
    check_labels([0, 1, 2, 1], 3, "train")
    check_labels(np.array([0, 2]), 3)
    check_labels([0, 1], 1000)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    fraction=st.floats(0.01, 0.95),
    seed=st.integers(0, 100),
)
def test_stratified_split_properties(counts, fraction, seed):
    labels = np.random.default_rng(seed).permutation([k for k, count in enumerate(counts) for _ in range(count)])
    room = sum(counts) - len(counts)
    if room == 0:
        with pytest.raises(ValueError, match="leave no class one to spare"):
            stratified_split(labels, fraction, seed)
        return
    kept, held_out = stratified_split(labels, fraction, seed)
    assert sorted(kept + held_out) == list(range(len(labels)))
    assert kept == sorted(kept)
    assert held_out == sorted(held_out)
    assert len(held_out) == min(max(1, round(len(labels) * fraction)), room)
    in_kept, in_held_out = Counter(labels[kept].tolist()), Counter(labels[held_out].tolist())
    bounded = any(count * fraction > count - 1 for count in counts)
    for k, count in enumerate(counts):
        assert in_kept[k] >= 1
        if not bounded and round(len(labels) * fraction) >= 1:
            assert abs(in_held_out[k] - count * fraction) < 1.5
    assert (kept, held_out) == stratified_split(list(labels), fraction, seed)


def test_stratified_split_of_small_equal_classes_is_fair():
    labels = [k for k in range(200) for _ in range(30)]  # 1.5 of each class
    _, held_out = stratified_split(labels, 0.05, 0)
    counts = Counter(labels[i] for i in held_out)
    assert len(held_out) == 300
    assert set(counts.values()) == {1, 2}
    assert len(counts) == 200
    assert Counter(labels[i] for i in stratified_split(labels, 0.05, 1)[1]) != counts
    assert len(stratified_split([0, 0, 0, 1], 0.01, 0)[1]) == 1


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 5, True, "0.1", float("nan")])
def test_stratified_split_refuses_other_fractions(fraction):
    with pytest.raises(ValueError, match="`fraction` must be between 0 and 1"):
        stratified_split([0, 0, 1, 1], fraction, 0)


def test_stratified_subset():
    labels = [0] * 60 + [1] * 30 + [2] * 10
    chosen = stratified_subset(labels, 10, seed=0)
    assert chosen == sorted(set(chosen))
    assert Counter(labels[i] for i in chosen) == {0: 6, 1: 3, 2: 1}
    assert chosen == stratified_subset(labels, 10, seed=0)
    assert chosen != stratified_subset(labels, 10, seed=1)
    assert len(stratified_subset(labels, 7, seed=0)) == 7
    assert stratified_subset(labels, 100, seed=0) == stratified_subset(labels, 1000, seed=0) == list(range(100))
    for size in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="`size` must be a positive integer"):
            stratified_subset(labels, size, seed=0)


# --- load_source -----------------------------------------------------------------------------------------------------


def test_load_source_of_folders(tmp_path):
    folder(tmp_path / "animals" / "train")
    folder(tmp_path / "animals" / "test")
    assert load_source(tmp_path / "animals" / "train") == tmp_path / "animals" / "train"
    assert load_source(str(tmp_path / "animals"), split="test") == tmp_path / "animals" / "test"
    with pytest.raises(ValueError, match=r"no split 'val'. Its sub-folders: test, train"):
        load_source(tmp_path / "animals", split="val")
    for options in ({"config": "small"}, {"revision": "main"}):
        with pytest.raises(ValueError, match="is a folder: `config` and `revision` are for data sets on the Hub"):
            load_source(tmp_path / "animals", split="test", **options)
    (tmp_path / "data.csv").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        load_source(tmp_path / "data.csv")
    for name in ("./missing", str(tmp_path / "missing"), "a/b/c"):
        with pytest.raises(FileNotFoundError, match="There is no folder"):
            load_source(name)


def test_load_source_of_saved_datasets(tmp_path):
    arrow().save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=arrow(), test=arrow(6)).save_to_disk(tmp_path / "two")
    datasets.DatasetDict(train=arrow()).save_to_disk(tmp_path / "single")
    assert len(load_source(tmp_path / "one")) == 12
    assert len(load_source(tmp_path / "two", split="test")) == 6
    assert len(load_source(tmp_path / "single")) == 12
    with pytest.raises(ValueError, match="splits train, test: the split is needed"):
        load_source(tmp_path / "two")
    with pytest.raises(ValueError, match="splits train, test: the split 'val' does not exist"):
        load_source(tmp_path / "two", split="val")
    with pytest.raises(ValueError, match="single data set without splits"):
        load_source(tmp_path / "one", split="train")


def test_load_source_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(path, split=None, **options):
        asked.append(options)
        if path == "org/damaged":
            raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")
        if path == "org/hidden":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/hidden' doesn't exist on the Hub")
        if path == "org/far":
            raise ConnectionError("Couldn't reach 'org/far' on the Hub")
        found = datasets.DatasetDict(train=arrow(), test=arrow(6))
        return found if split is None else found[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_source("org/animals", split="train")) == 12
    assert len(load_source("org/animals", split="test", config="small", revision="abc")) == 6
    with pytest.raises(ValueError, match="splits train, test"):
        load_source("org/animals", config="small")
    assert asked == [{}, {"name": "small", "revision": "abc"}, {"name": "small"}]
    with pytest.raises(ValueError, match="splits train, test"):
        load_source("org/animals")
    with pytest.raises(FileNotFoundError, match=r"no folder 'org/hidden'.*doesn't exist on the Hub"):
        load_source("org/hidden")
    with pytest.raises(FileNotFoundError, match=r"no folder 'org/far'.*cannot be reached"):
        load_source("org/far")
    with pytest.raises(ValueError, match="'org/damaged' cannot be read: An error occurred"):
        load_source("org/damaged")


# --- files in folders ------------------------------------------------------------------------------------------------


def test_animations_in_a_folder_show_their_first_frame(tmp_path):
    root = folder(tmp_path, names=["cat", "dog"])
    (root / "fox").mkdir()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(root / "fox" / "moving.GIF", "GIF", save_all=True, append_images=frames[1:])
    data = as_pixel_dataset(root, PREPROCESSING)
    assert (data.class_names, data.labels[-1], len(data)) == (["cat", "dog", "fox"], 2, 7)
    torch.testing.assert_close(data[6]["pixel_values"], exact(frames[0]))


@pytest.mark.parametrize("extension", [".jfif", ".tga", ".jp2", ".pbm", ".avif"])
def test_every_extension_that_is_read_has_a_decoder(extension, tmp_path):
    if extension not in image_extensions():
        pytest.skip(f"this Pillow does not read {extension}")
    root = folder(tmp_path, names=["cat", "dog"])
    picture(3).save(root / "cat" / f"x{extension}")
    data = as_pixel_dataset(root, PREPROCESSING)
    assert len(data) == 7
    assert_item(data[3], 0)


def test_files_that_are_passed_over_are_named(tmp_path, caplog):
    root = folder(tmp_path)
    for name in ("a.psd", "b.xyz", "no_extension", ".hidden.psd", "notes.txt", "a.json", "Thumbs.db"):
        (root / "dog" / name).write_bytes(b"something")
    assert len(as_pixel_dataset(root, PREPROCESSING)) == 9
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "3 files of" in warning
    for name in ("a.psd", "b.xyz", "no_extension"):
        assert str(Path("dog", name)) in warning
    assert "Extensions read: .jpg, " in warning
    assert ".gif" in warning
    assert "hidden" not in warning


def test_side_files_alone_are_no_reason_to_warn(tmp_path, caplog):
    root = folder(tmp_path)
    (root / "dog" / "labels.CSV").write_text("a,b")
    as_pixel_dataset(root, PREPROCESSING)
    assert not caplog.records


def test_a_folder_of_unread_files_alone_names_them(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.xyz").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"contain no images. Extensions read: .*Other files: cat.a\.xyz"):
        as_pixel_dataset(tmp_path, PREPROCESSING)
