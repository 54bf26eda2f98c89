"""What reports and cards call the data, and how an image is recognised."""

import io
import tarfile

import datasets
import pytest
import torch
from datasets.iterable_dataset import ExamplesIterable
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from autolora_hf import Preprocessing
from autolora_hf.data import as_pixel_dataset, as_pixel_stream, describe_data, load_shards
from autolora_hf.evaluation.samples import sample_digest
from autolora_hf.quickstart import load_digits


_FILE = io.BytesIO()
Image.new("RGB", (8, 8)).save(_FILE, "PNG")
PNG = _FILE.getvalue()
NOTHING = {"name": None, "kind": "memory", "config": None, "split": None, "revision": None}


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "birds" / split / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "birds" / split / label / "1.png")
    return tmp_path / "birds"


def test_a_folder_is_called_by_its_name_alone(folder):
    expected = {**NOTHING, "name": "birds", "kind": "folder", "split": "test"}
    pixel_dataset = as_pixel_dataset(folder / "test", Preprocessing((8, 8)))
    for data in (str(folder / "test"), folder / "test", pixel_dataset, pixel_dataset.select([1])):
        assert describe_data(data) == expected
    assert describe_data(Subset(pixel_dataset.source, [0])) == expected
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="test")
    assert describe_data(loaded)["split"] == "test" and describe_data(loaded)["kind"] == "folder"
    assert str(folder.parent) not in str(describe_data(loaded))


def test_a_data_set_of_the_hub_is_called_by_repository_and_commit():
    info = datasets.DatasetInfo(
        dataset_name="birds",
        config_name="small",
        download_checksums={"hf://datasets/org/birds@0123abc/data/test.parquet": {"num_bytes": 1, "checksum": None}},
    )
    data = datasets.Dataset.from_dict({"image": [[0]], "label": [0]}, info=info, split="test")
    expected = {"name": "org/birds", "kind": "hub", "config": "small", "split": "test", "revision": "0123abc"}
    assert describe_data(data) == expected
    assert describe_data(data.select([0])) == expected
    assert describe_data(data.shuffle(seed=0)) == expected


def test_the_digits_of_the_quickstart():
    test = load_digits()["test"]
    assert describe_data(test) == {**NOTHING, "name": "digits", "kind": "quickstart", "split": "test"}
    assert describe_data(as_pixel_dataset(test, Preprocessing((28, 28)))) == describe_data(test)
    # Another data set of that name is another one.
    other = datasets.Dataset.from_dict({"label": [0]}, info=datasets.DatasetInfo(dataset_name="digits"))
    assert describe_data(other)["kind"] == "folder"


def add_shard(path):
    with tarfile.open(path, "w") as shard:
        for name, content in (("1.cls", b"0"), ("1.png", PNG)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    return path


def test_a_stream_of_shards_is_called_by_the_folder_they_lie_in(tmp_path):
    (tmp_path / "birds" / "val").mkdir(parents=True)
    folder = tmp_path / "birds" / "val"
    files = [str(add_shard(folder / f"birds-{number}.tar")) for number in range(2)]
    expected = {**NOTHING, "name": "birds", "kind": "folder", "split": "val"}
    for pattern in (folder / "birds-*.tar", str(folder / "*.tar"), files):
        stream = load_shards(pattern)
        for data in (stream, stream.take(1), stream.shuffle(seed=0), as_pixel_stream(stream, Preprocessing((8, 8)))):
            assert describe_data(data) == expected
    # Nothing says of which split these are.
    add_shard(tmp_path / "birds" / "1.tar")
    assert describe_data(load_shards(tmp_path / "birds" / "*.tar")) == {**expected, "split": None}


def test_a_stream_of_a_folder_is_called_as_the_folder(folder):
    stream = datasets.load_dataset("imagefolder", data_dir=str(folder), split="test", streaming=True)
    assert describe_data(stream) == describe_data(folder / "test")


def test_a_stream_of_the_hub_is_called_by_repository_and_commit():
    files = {"files": [["hf://datasets/org/birds@0123abc/data/test.parquet"]]}
    info = datasets.DatasetInfo(dataset_name="birds", builder_name="parquet", config_name="small")
    data = datasets.IterableDataset(ExamplesIterable(iter, files), info=info, split=datasets.Split("test"))
    expected = {"name": "org/birds", "kind": "hub", "config": "small", "split": "test", "revision": "0123abc"}
    assert describe_data(data) == describe_data(data.skip(1)) == expected


def test_a_stream_of_something_in_memory_is_called_as_that():
    test = load_digits()["test"]
    assert describe_data(test.to_iterable_dataset()) == describe_data(test)
    made = datasets.IterableDataset.from_generator(lambda folder: iter([{"label": 0}]), gen_kwargs={"folder": "/a/b"})
    assert describe_data(made) == NOTHING


def test_what_lies_in_memory_has_no_name():
    pixels, labels = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    assert describe_data((pixels, labels)) == describe_data(TensorDataset(pixels, labels)) == NOTHING
    assert describe_data(datasets.Dataset.from_dict({"label": [0]})) == NOTHING


def test_digests_tell_images_apart():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    digest = sample_digest(image, 3)
    assert len(digest) == 12 and int(digest, 16) >= 0
    # Rounding errors of another machine do not matter, a step of an 8-bit value or another label does.
    grid = (image * 255).round() / 255
    assert sample_digest(grid + 1e-4, 3) == sample_digest(grid - 1e-4, 3) == digest
    changed = grid.clone()
    changed[0, 0, 0] += 1 / 255 if changed[0, 0, 0] < 0.5 else -1 / 255
    assert sample_digest(changed, 3) != digest and sample_digest(image, 4) != digest
