"""No image on both sides: validation against training data, test data against both, by origin and by content."""

import io
import logging
import re
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import Labelled, Pairs, arrow, exact, folder, picture
from test_trainer import arguments, pictures
from tiny_models import MODELS
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import CIFAR10, ImageFolder, VisionDataset

from autolora_hf import AutoLoraTrainer
from autolora_hf.data import (
    as_pixel_dataset,
    check_unseen,
    duplicate_groups,
    find_overlap,
    named_test_set,
    same_data,
    stratified_split,
)
from autolora_hf.data import overlap as overlap_module
from autolora_hf.pixels import Preprocessing
from autolora_hf.training.data import hold_out


PREPROCESSING = Preprocessing((8, 8), crop_pct=1.0)


def pixel(source, name="dataset"):
    return as_pixel_dataset(source, PREPROCESSING, name=name)


def stored(count=12, seed=0):
    """`arrow` without a fingerprint or memory in common with other calls."""
    return arrow(count, seed=seed).add_column("number", list(np.random.default_rng().integers(0, 2**60, count)))


def tensors(count=12, seed=0):
    images = torch.stack([exact(picture(seed + i)) for i in range(count)])
    return TensorDataset(images, torch.arange(count) % 3)


def in_another_format(root, target, kind):
    for path in sorted(root.rglob("*.png")):
        new = (target / path.parent.name / f"other-{path.stem}").with_suffix(f".{kind}")
        new.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(new)
    return target


# ---- copies are found, whatever became of them ----


def copies(tmp_path):
    """Ways of having the images of `folder` a second time; 9 images, 3 a class."""
    root = folder(tmp_path / "one")
    shutil.copytree(root, tmp_path / "copy")
    renamed = tmp_path / "renamed"
    for path in sorted(root.rglob("*.png")):
        target = renamed / path.parent.name.upper() / f"x{path.stem}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    paths = sorted(str(path) for path in root.rglob("*.png"))
    labels = [i // 3 for i in range(9)]
    of_paths = datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)
    of_pictures = datasets.Dataset.from_dict(
        {"image": [picture(10 * k + i) for k in range(3) for i in range(3)], "label": labels}, features=features
    )
    of_pictures.save_to_disk(tmp_path / "saved", num_shards=2)
    arrays = np.stack([np.asarray(Image.open(path)) for path in paths])
    return {
        "copied folder": tmp_path / "copy",
        "renamed": renamed,
        "bmp": in_another_format(root, tmp_path / "bmp", "bmp"),
        "tiff": in_another_format(root, tmp_path / "tiff", "tiff"),
        "torchvision": ImageFolder(root),
        "with a random transform": ImageFolder(tmp_path / "copy", transform=lambda image: torch.rand(3, 8, 8)),
        "paths in arrow": of_paths,
        "bytes in arrow": of_pictures,
        "saved and loaded": datasets.load_from_disk(str(tmp_path / "saved")),
        "shuffled": of_pictures.shuffle(seed=0),
        "joined": ConcatDataset([arrow(2, seed=300), of_pictures]),
        "subset": Subset(of_pictures, [8, 3]),
        "tensors": TensorDataset(torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255, torch.tensor(labels)),
        "pairs of pictures": Pairs([(Image.fromarray(array), 0) for array in arrays]),
        "dictionaries": Pairs([{"image": array, "label": 1} for array in arrays]),
    }


def test_copies_of_a_folder_are_found(tmp_path):
    sources = copies(tmp_path)
    known = pixel(tmp_path / "one", "train")
    for name, source in sources.items():
        for first, second in ((known, pixel(source)), (pixel(source), known)):
            found = find_overlap(first, second)
            count = 2 if name == "subset" else 9
            assert len(found) == count, name
            for position, partner in zip(found.positions, found.partners, strict=True):
                if name != "with a random transform":
                    a, b = second[position]["pixel_values"], first[partner]["pixel_values"]
                    torch.testing.assert_close(a, b, msg=name)
            assert same_data(first, second), name


def test_other_images_of_the_same_kind_are_not_found(tmp_path):
    one = pixel(folder(tmp_path / "one"))
    others = [folder(tmp_path / "two", seed=500), stored(seed=500), tensors(seed=500), Labelled(6, first=500)]
    for source in others:
        assert len(find_overlap(one, pixel(source))) == 0
        assert len(find_overlap(pixel(source), one)) == 0


def test_single_copies_among_many_are_found_and_named(tmp_path):
    root = folder(tmp_path / "train", per_class=40)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    for i in range(20):
        picture(9000 + i).save(tmp_path / "val" / "cat" / f"{i:02}.png")
    shutil.copy(root / "dog" / "7.png", tmp_path / "val" / "cat" / "05.png")
    found = find_overlap(pixel(root, "train"), pixel(tmp_path / "val", "val"))
    assert found.positions == [5]
    assert not found.same_rows
    assert not found.tolerable
    assert "1 of 20 images, compared by content" in str(found)
    assert str(tmp_path / "val" / "cat" / "05.png") in str(found)
    partner = found.first.image_name(found.partners[0])
    # Images 7 of "dog" are seeds 17; the same picture is 17 of "cat".
    assert partner.endswith(("dog/7.png)", "cat/17.png)"))


def test_rows_of_one_data_set_are_never_tolerated():
    source = arrow(300)
    found = find_overlap(pixel(source.select(range(100))), pixel(source.select(range(99, 300))))
    assert (found.positions, found.partners) == ([0], [99])
    assert found.same_rows
    assert not found.tolerable


def test_the_bounds_of_the_comparison_by_pixels(tmp_path, monkeypatch, caplog):
    one = folder(tmp_path / "one")
    other = in_another_format(one, tmp_path / "other", "bmp")
    shutil.copy(one / "cat" / "0.png", other / "cat" / "copy.png")
    Image.open(one / "fox" / "1.png").resize((5, 7)).save(one / "fox" / "rare.png")
    Image.open(one / "fox" / "rare.png").save(other / "fox" / "rare.bmp")

    def found():
        return find_overlap(pixel(one), pixel(other))

    assert len(found()) == 11
    # The rare size comes first.
    monkeypatch.setattr(overlap_module, "_MOST_DECODED_PIXELS", 100)
    with caplog.at_level(logging.INFO):
        assert len(found()) == 2
    assert "8 x 8 pixels and more common sizes" in caplog.text
    # Files are always compared.
    monkeypatch.setattr(overlap_module, "_MOST_DECODED_IMAGES", 10)
    with caplog.at_level(logging.INFO):
        assert len(found()) == 1
    assert "too many to compare them by their pixels" in caplog.text


def test_broken_images_equal_nothing(tmp_path):
    for name in ("one", "other"):
        root = folder(tmp_path / name, seed=0 if name == "one" else 500)
        (root / "cat" / "0.png").write_bytes(b"")
        (root / "cat" / "1.png").write_bytes(b"no image" + name.encode())
    assert len(find_overlap(pixel(tmp_path / "one"), pixel(tmp_path / "other"))) == 0


class Drawing(Pairs):
    def __getitem__(self, index):
        return torch.rand(3, 8, 8), 0


def test_the_comparison_leaves_the_random_state_alone(tmp_path):
    state = torch.get_rng_state()
    drawing = pixel(Drawing(range(3)))
    torch.set_rng_state(state)
    find_overlap(drawing, pixel(folder(tmp_path)))
    assert torch.equal(torch.get_rng_state(), state)


# ---- the split into training and validation images ----


@pytest.mark.parametrize("kind", ["arrow", "files", "tensors", "joined"])
def test_copies_stay_on_one_side(kind, tmp_path):
    """A training set in which every image is there three times."""
    if kind == "arrow":
        source = datasets.concatenate_datasets([arrow(30)] * 3)
    elif kind == "files":
        source = folder(tmp_path, per_class=10)
        for path in sorted(source.rglob("*.png")):
            for copy in "ab":
                shutil.copy(path, path.with_name(f"{path.stem}{copy}.png"))
    elif kind == "tensors":
        source = TensorDataset(*(values.repeat(3, *[1] * (values.ndim - 1)) for values in tensors(30).tensors))
    else:
        source = ConcatDataset([arrow(30), stored(30), arrow(30)])
    data = pixel(source)
    groups = duplicate_groups(data)
    assert (np.bincount(groups)[np.unique(groups)] == 3).all()
    kept, held_out = hold_out(data, 0.2, 0)
    assert len(kept) + len(held_out) == 90
    assert len(find_overlap(kept, held_out)) == 0
    assert 6 <= len(held_out) <= 36
    assert set(kept.labels) == {0, 1, 2}


def test_without_copies_the_split_is_the_plain_one():
    data = pixel(arrow(60))
    assert (duplicate_groups(data) == np.arange(60)).all()
    kept, held_out = hold_out(data, 0.2, 3)
    assert [part._indices.tolist() for part in (kept, held_out)] == list(stratified_split(data.labels, 0.2, 3))


def test_no_class_goes_to_the_validation_images_as_a_whole():
    labels = [0] * 40 + [1] * 40
    groups = np.array([*range(40), *[40] * 40])  # class 1 is one image
    for seed in range(20):
        kept, held_out = stratified_split(labels, 0.4, seed, groups)
        assert {labels[i] for i in kept} == {0, 1}
        assert {labels[i] for i in held_out} == {0}
        assert sorted(kept + held_out) == list(range(80))
    with pytest.raises(ValueError, match="4 samples are copies of 2 images, and none can be spared"):
        stratified_split([0, 0, 1, 1], 0.4, 0, np.array([0, 0, 2, 2]))


# ---- test sets ----


class Digits(VisionDataset):
    """Looks like the MNIST of torchvision."""

    def __init__(self, train):
        super().__init__("somewhere")
        self.train = train
        self.data = torch.stack([(exact(picture(i)) * 255).byte()[0] for i in range(12)])
        self.targets = torch.arange(12) % 3

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return Image.fromarray(self.data[index].numpy()), int(self.targets[index])


class Pets(VisionDataset):
    def __init__(self, split):
        super().__init__("somewhere")
        self.split = split


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (lambda path: pictures(6, split="test"), "the 'test' split"),
        (lambda path: pixel(pictures(6, split="test")).select([0]), "the 'test' split"),
        (lambda path: folder(path / "test"), "the folder 'test'"),
        (lambda path: str(folder(path / "Testing")), "the folder 'Testing'"),
        (lambda path: ImageFolder(folder(path / "test")), "the folder 'test'"),
        (lambda path: Digits(train=False), r"the test split \(`train=False`\) of Digits"),
        (lambda path: Pets("test"), "the 'test' split"),
        (lambda path: Subset(Digits(train=False), [0, 1]), "test split"),
        (lambda path: ConcatDataset([Digits(train=True), Digits(train=False)]), "test split"),
        (lambda path: pixel(Digits(train=False)), "test split"),
        (lambda path: datasets.Dataset.from_dict({"a": [0]}, split="train+test"), r"the 'train\+test' split"),
    ],
)
def test_test_sets_are_recognised(source, name, tmp_path):
    assert re.search(name, named_test_set(source(tmp_path)))


@pytest.mark.parametrize(
    "source",
    [
        lambda path: arrow().train_test_split(0.2)["train"],
        lambda path: folder(path / "contest"),
        lambda path: folder(path / "val"),
        lambda path: Digits(train=True),
        lambda path: Pets("trainval"),
        lambda path: Pairs([(picture(0), 0)]),
        lambda path: CIFAR10.__new__(CIFAR10),
    ],
)
def test_other_sets_are_no_test_sets(source, tmp_path):
    assert named_test_set(source(tmp_path)) is None


# ---- the trainer ----


def with_validation(folder, validation, train=None):
    model = MODELS["hf_vit"].adapted(num_classes=3)
    return AutoLoraTrainer(model, arguments(folder), train_dataset=train or pictures(), eval_dataset=validation)


def copied(source, rows):
    """A data set of the same images, encoded anew, which has nothing else in common with `source`."""
    buffers = []
    for row in rows:
        buffers.append(io.BytesIO())
        source[row]["image"].save(buffers[-1], "bmp")
    images = [{"bytes": buffer.getvalue(), "path": None} for buffer in buffers]
    columns = {"image": images, "label": [source[row]["label"] for row in rows]}
    return datasets.Dataset.from_dict(columns, features=source.features)


def test_copied_training_images_are_no_validation_set(tmp_path):
    validation = datasets.concatenate_datasets([copied(pictures(), [4, 8, 9]), pictures(12, seed=1)])
    with pytest.raises(ValueError) as error:
        with_validation(tmp_path, validation)
    message = "`eval_dataset` shares images with `train_dataset` (3 of 15 images, compared by content"
    assert message in str(error.value)
    assert "image[0] = image[4], image[1] = image[8], image[2] = image[9]" in str(error.value)


def test_a_few_copies_are_left_out_of_the_validation_set(tmp_path, caplog):
    validation = datasets.concatenate_datasets([pictures(120, seed=1), copied(pictures(), [4])])
    trainer = with_validation(tmp_path, validation)
    assert len(trainer.eval_dataset) == 120
    assert "exact copies of training images (1 of 121 images" in caplog.text
    assert len(find_overlap(trainer.train_dataset, trainer.eval_dataset)) == 0


def test_test_sets_are_no_validation_sets(tmp_path):
    with pytest.raises(ValueError, match=r"`eval_dataset` is the folder 'test'.*Leave `eval_dataset` out"):
        with_validation(tmp_path, folder(tmp_path / "test", names=["circle", "cross", "square"]))
    with pytest.raises(ValueError, match=r"`eval_dataset` is the test split \(`train=False`\) of Digits"):
        with_validation(tmp_path, Digits(train=False))


def test_copied_images_are_no_test_data(tmp_path):
    trainer = with_validation(tmp_path, pictures(120, seed=1))
    for kind, source in (("training", pictures()), ("validation", pictures(120, seed=1))):
        test = datasets.concatenate_datasets([copied(source, [4, 8]), pictures(9, seed=5)])
        with pytest.raises(ValueError, match=rf"shares images with the {kind} data \(2 of 11 images"):
            trainer.prepare_test_data(test)
        with pytest.raises(ValueError, match=rf"shares images with the {kind} data"):
            trainer.evaluate_robustness(test, attack="pgd", progress=False)
    assert trainer.model.results == []


def test_a_report_mentions_single_copies(tmp_path, caplog):
    trainer = with_validation(tmp_path, pictures(60, seed=1))
    test = datasets.concatenate_datasets([pictures(120, seed=5), copied(pictures(), [4])])
    prepared = trainer.prepare_test_data(test)
    assert len(prepared) == 121
    assert "1 of 121 test images are exact copies of training images" in caplog.text
    assert "image[120] = image[4]" in caplog.text
    report = trainer.evaluate_robustness(prepared, attack="pgd", sample_indices=[0, 1, 2], progress=False)
    assert sum("exact copies of training images" in warning for warning in report.warnings) == 1
    assert "exact copies" in str(trainer.model.results[0]["warnings"])
    clean = trainer.evaluate_robustness(pictures(9, seed=6), attack="pgd", progress=False)
    assert not any("exact copies" in warning for warning in clean.warnings)


def test_check_unseen_of_what_is_known():
    test = pixel(arrow(seed=100), "test")
    assert check_unseen(test, {"training": None, "validation": None}) == []
    assert check_unseen(test, {"training": pixel(arrow()), "validation": None}) == []
    with pytest.raises(ValueError, match=r"--data shares images with the validation data.*selected with"):
        check_unseen(test, {"training": pixel(arrow()), "validation": pixel(stored(seed=100))}, "--data")


# ---- the same broken file twice ----

ERROR_PAGE = b"<html>404</html>"


def test_equal_files_that_cannot_be_read_are_no_common_images(tmp_path):
    for name in ("one", "other"):
        root = folder(tmp_path / name, seed=0 if name == "one" else 500)
        (root / "cat" / "0.png").write_bytes(ERROR_PAGE)
        (root / "dog" / "1.png").write_bytes(ERROR_PAGE)
    one, other = pixel(tmp_path / "one"), pixel(tmp_path / "other")
    assert len(find_overlap(one, other)) == 0
    assert not same_data(one, other)
    # Nor are they copies that a split has to keep together, unlike the real copy.
    shutil.copy(tmp_path / "one" / "fox" / "0.png", tmp_path / "one" / "fox" / "9.png")
    assert duplicate_groups(pixel(tmp_path / "one")).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 6]


def test_training_goes_on_where_both_sets_hold_the_same_error_page(tmp_path, caplog):
    train, val = folder(tmp_path / "train", per_class=4), folder(tmp_path / "val", seed=500)
    for root in (train, val):
        (root / "cat" / "0.png").write_bytes(ERROR_PAGE)
    trainer = with_validation(tmp_path / "out", val, train)
    assert len(trainer.eval_dataset) == 8
    assert "1 of 9 images of eval_dataset cannot be read" in caplog.text
    assert "exact copies" not in caplog.text
    # A true copy is counted among the images that can be read.
    shutil.copy(train / "dog" / "2.png", val / "dog" / "2.png")
    with pytest.raises(ValueError, match="shares images with `train_dataset` \\(1 of 8 images"):
        with_validation(tmp_path / "out", val, train)
