"""What reports and cards call the data, and how an image is recognised."""

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

from autolora_hf import Preprocessing
from autolora_hf.data import as_pixel_dataset, describe_data
from autolora_hf.evaluation.samples import sample_digest
from autolora_hf.quickstart import load_digits


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
