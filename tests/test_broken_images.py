"""Broken images in training, validation and worker processes, and augmentation that depends on nothing else."""

import logging
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import Labelled, Pairs, arrow, exact, folder, picture
from test_trainer import NAMES, Spy, StopAfter, arguments, copied_state, pictures, same
from tiny_models import IMAGE_SIZE, MODELS
from torch.utils.data import DataLoader, Subset
from torchvision.transforms import v2

from autolora_hf import AutoLoraTrainer, ThreatModel, evaluate_robustness
from autolora_hf.data import (
    BrokenImageError,
    PixelTransform,
    as_pixel_dataset,
    collate,
    find_broken,
    without_absent,
    without_broken,
)
from autolora_hf.data.folders import ClassFolder
from autolora_hf.pixels import Preprocessing


PREPROCESSING = Preprocessing((8, 8), crop_pct=1.0)
TRUNCATED, TEXT, EMPTY, MISSING = "truncated", "text", "empty", "missing"


def spoil(path, how):
    data = path.read_bytes()
    if how == MISSING:
        path.unlink()
    else:
        path.write_bytes({TRUNCATED: data[: len(data) // 2], TEXT: b"a text file", EMPTY: b""}[how])


def spoiled_arrow(root, broken, count=12):
    """Row numbers in `broken` hold damaged bytes; the others are those of `arrow`."""
    rows = []
    for i in range(count):
        file = root / f"{i}.png"
        picture(i).save(file)
        if i in broken:
            spoil(file, broken[i])
        rows.append({"bytes": file.read_bytes(), "path": None} if file.exists() else None)
    source = arrow(count)
    return datasets.Dataset.from_dict({"image": rows, "label": source["label"][:]}, features=source.features)


def spoiled_folder(root, broken, per_class=4):
    """Class and number of an image to how it is broken; a listing made before they went missing."""
    folder(root, per_class=per_class)
    listed = ClassFolder(root)
    for (name, number), how in broken.items():
        spoil(root / name / f"{number}.png", how)
    return listed


def pixel(source, **options):
    return as_pixel_dataset(source, PREPROCESSING, name="train", **options)


# ---- what stands in for a broken image ----


def test_the_next_image_of_the_class_takes_the_place(tmp_path):
    # Labels are 0, 1, 2, 0, 1, 2, ...
    data = pixel(spoiled_arrow(tmp_path, {1: TRUNCATED, 4: TEXT, 11: EMPTY, 6: MISSING}), broken_images="skip")
    assert data.broken == []
    items = list(data)
    for index, shown in enumerate([0, 7, 2, 3, 7, 5, 9, 7, 8, 9, 10, 2]):
        torch.testing.assert_close(items[index]["pixel_values"], exact(picture(shown)))
        assert items[index]["labels"] == index % 3
    assert data.broken == [1, 4, 6, 11]
    assert data.select([4, 5]).broken == [0]
    with pytest.raises(BrokenImageError, match=r"`image\[1\] of train` cannot be read: it is damaged"):
        _ = data.select(range(12), broken_images="raise")[1]


def test_the_substitute_comes_from_the_selection(tmp_path):
    data = pixel(spoiled_arrow(tmp_path, {1: TEXT}), broken_images="skip").select([10, 1, 0, 2])
    torch.testing.assert_close(data[1]["pixel_values"], exact(picture(10)))


def test_a_class_without_readable_images(tmp_path):
    broken = dict.fromkeys([1, 4, 7, 10], TEXT)
    data = pixel(spoiled_arrow(tmp_path, broken), broken_images="skip")
    assert data[3]["labels"] == 0
    with pytest.raises(BrokenImageError, match=r"None of the images of class 1 of train .* image\[4\]"):
        _ = data[4]


def test_broken_files_of_a_folder(tmp_path):
    broken = {("cat", 0): TEXT, ("dog", 2): TRUNCATED, ("dog", 3): MISSING, ("fox", 0): EMPTY}
    data = pixel(spoiled_folder(tmp_path, broken), broken_images="skip")
    torch.testing.assert_close(data[0]["pixel_values"], exact(picture(1)))
    torch.testing.assert_close(data[6]["pixel_values"], exact(picture(10)))
    assert [data[i]["labels"] for i in range(12)] == data.labels
    assert data.broken == [0, 6, 7, 8]
    assert str(tmp_path / "dog" / "2.png") in data.image_name(6)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_say_which_images_were_broken(tmp_path, workers):
    source = spoiled_arrow(tmp_path, {1: TEXT, 10: TRUNCATED})
    alone = pixel(source, broken_images="skip", augmentation="crop-flip")
    expected = collate([alone[i] for i in range(12)])
    data = pixel(source, broken_images="skip", augmentation="crop-flip")
    batches = list(DataLoader(data, batch_size=4, num_workers=workers, collate_fn=collate))
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 4]
    assert torch.equal(torch.cat([batch["pixel_values"] for batch in batches]), expected["pixel_values"])
    assert data.broken == [1, 10]


def test_storage_that_fails_is_no_broken_image(tmp_path, monkeypatch):
    data = pixel(folder(tmp_path), broken_images="skip")

    def read_bytes(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", read_bytes)
    with pytest.raises(OSError, match=r"`image\[3\] of train` cannot be read: .*Input/output error"):
        _ = data[3]
    assert data.broken == []


class Opening(Labelled):
    """Opens files itself, as torch data sets do; some fail."""

    def __init__(self, broken, n=12):
        super().__init__(n)
        self.broken = broken

    def __getitem__(self, index):
        if index in self.broken:
            raise self.broken[index]
        return super().__getitem__(index)


def test_torch_data_sets_that_fail_to_read(tmp_path):
    lazy = tmp_path / "lazy.png"
    picture(0).save(lazy)
    spoil(lazy, TRUNCATED)
    source = Opening({0: OSError("image file is truncated"), 3: SyntaxError("broken PNG file")})
    source.items[5] = (Image.open(lazy), 1)
    source.items[6] = (None, 0)
    data = pixel(source, broken_images="skip")
    assert data.labels == [i % 2 for i in range(12)]
    assert [item["labels"] for item in data] == data.labels
    assert data.broken == [0, 3, 5, 6]
    with pytest.raises(KeyError, match="a mistake"):
        _ = pixel(Opening({2: KeyError("a mistake")}), broken_images="skip")[2]
    with pytest.raises(BrokenImageError, match=r"None of the 12 images can be read. The last one: truncated"):
        pixel(Opening(dict.fromkeys(range(12), OSError("truncated"))))
    with pytest.raises(BrokenImageError, match=r"`image\[1\]` cannot be read, and the data set has no `targets`"):
        _ = pixel(Pairs([(picture(0), 0), (None, 1)])).labels


def test_wrong_values_are_no_broken_images():
    data = pixel(Pairs([(exact(picture(0)), 0), (torch.full((3, 8, 8), 7.0), 0)]), broken_images="skip")
    with pytest.raises(ValueError, match=r"`image\[1\] of train` must be in \[0, 1\]"):
        _ = data[1]
    with pytest.raises(ValueError, match=r"`image\[1\] of train` must be in \[0, 1\]"):
        find_broken(data)


# ---- leaving broken images out ----


def test_broken_images_are_left_out_up_front(tmp_path, caplog):
    broken = {("cat", 0): TEXT, ("dog", 2): TRUNCATED, ("dog", 3): MISSING, ("fox", 0): EMPTY}
    data = pixel(spoiled_folder(tmp_path, broken), broken_images="skip")
    assert find_broken(data) == [0, 6, 7, 8]
    assert find_broken(data, [8, 9, 6]) == [8, 6]
    assert len(without_absent(data)) == 10
    assert "2 of 12 images of train are missing or empty: image[7]" in caplog.text
    assert str(tmp_path / "fox" / "0.png") in caplog.text
    rest = without_broken(data)
    assert rest.labels == [0] * 3 + [1] * 2 + [2] * 3
    assert "4 of 12 images of train cannot be read: image[0]" in caplog.text
    assert find_broken(rest) == []
    assert without_broken(rest) is rest
    for check in (without_absent, without_broken):
        with pytest.raises(BrokenImageError, match=r"of 12 images of train .*`broken_images='skip'`"):
            check(data.select(range(12), broken_images="raise"))
        with pytest.raises(BrokenImageError, match=r"1 of 1 images of train .*Nothing is left"):
            check(data.select([7]))


def test_broken_images_of_other_data_sets_are_found():
    source = Opening({3: OSError("truncated")})
    assert find_broken(pixel(source)) == [3]
    assert find_broken(pixel(Subset(source, [5, 3, 1]))) == [1]


# ---- the trainer ----


def image_folder(root, seed=0, count=60):
    for i, row in enumerate(pictures(count, seed=seed)):
        path = root / NAMES[row["label"]] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    return root


def new_trainer(folder, train, validation=None, **changes):
    model = MODELS["hf_vit"].adapted(num_classes=3)
    options = {"kind": AutoLoraTrainer, **changes}
    kind = options.pop("kind")
    return kind(model, arguments(folder, **options), train_dataset=train, eval_dataset=validation)


def test_broken_training_images_do_not_stop_a_run(tmp_path, caplog):
    train, validation = image_folder(tmp_path / "train"), image_folder(tmp_path / "val", seed=1, count=12)
    for name, how in (("circle/000", TEXT), ("cross/004", TRUNCATED), ("square/008", EMPTY)):
        spoil(train / f"{name}.png", how)
    runs = []
    for workers in (0, 2):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            trainer = new_trainer(
                tmp_path / "out", train, validation, kind=Spy, num_train_epochs=2, dataloader_num_workers=workers
            )
            trainer.train()
        assert len(trainer.train_dataset) == 59
        assert [len(labels) for labels, _ in trainer.batches] == [16, 16, 16, 11] * 2
        assert "1 of 60 images of train_dataset are missing or empty" in caplog.text
        found = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
        assert len(found) == 1  # of each image once, not in every epoch
        assert "2 of 59 images of train_dataset cannot be read (2 so far)" in found[0]
        assert str(train / "circle" / "000.png") in found[0]
        assert str(train / "cross" / "004.png") in found[0]
        runs.append(copied_state(trainer.model))
    assert same(*runs)


def test_broken_validation_images_are_left_out(tmp_path, caplog):
    train, validation = image_folder(tmp_path / "train"), image_folder(tmp_path / "val", seed=1, count=12)
    spoil(validation / "circle" / "000.png", TRUNCATED)
    spoil(validation / "cross" / "001.png", EMPTY)
    trainer = new_trainer(tmp_path / "out", train, validation)
    assert len(trainer.eval_dataset) == trainer.plan["validation_images"] == 10
    assert "1 of 11 images of eval_dataset cannot be read" in caplog.text
    with pytest.raises(BrokenImageError, match=r"1 of 12 images of eval_dataset are missing or empty: .*001\.png"):
        new_trainer(tmp_path / "out", train, validation, broken_images="raise")


def test_broken_held_out_images_are_left_out(tmp_path, caplog):
    train = image_folder(tmp_path / "train")
    whole = new_trainer(tmp_path / "out", train)
    name = whole.eval_dataset.stored.path(3)
    spoil(type(tmp_path)(name), TRUNCATED)
    trainer = new_trainer(tmp_path / "out", train)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (48, 11)
    assert name in caplog.text
    with pytest.raises(BrokenImageError, match="1 of 12 images of train_dataset cannot be read"):
        new_trainer(tmp_path / "out", train, broken_images="raise")


def test_nothing_but_broken_images(tmp_path):
    train, validation = image_folder(tmp_path / "train"), image_folder(tmp_path / "val", seed=1, count=12)
    for path in validation.rglob("*.png"):
        spoil(path, TRUNCATED)
    with pytest.raises(BrokenImageError, match=r"12 of 12 images of eval_dataset cannot be read.*Nothing is left"):
        new_trainer(tmp_path / "out", train, validation)
    for path in train.rglob("*.png"):
        spoil(path, EMPTY)
    with pytest.raises(BrokenImageError, match=r"60 of 60 images of train_dataset are missing or empty.*Nothing"):
        new_trainer(tmp_path / "out", train)


def test_raise_stops_a_run(tmp_path):
    train, validation = image_folder(tmp_path / "train"), image_folder(tmp_path / "val", seed=1, count=12)
    spoil(train / "cross" / "004.png", TRUNCATED)
    trainer = new_trainer(tmp_path / "out", train, validation, broken_images="raise")
    with pytest.raises(BrokenImageError, match=r"of train_dataset` cannot be read: .*004\.png"):
        trainer.train()
    with pytest.raises(ValueError, match="`broken_images` must be 'skip' or 'raise', got 'ignore'"):
        arguments(tmp_path, broken_images="ignore")


# ---- augmentation ----


def epochs_of(data, workers, persistent=False, epochs=(0, 1, 2)):
    options = {"num_workers": workers, "persistent_workers": persistent}
    loader = DataLoader(data, batch_size=5, collate_fn=partial(collate), **options)
    found = []
    for epoch in epochs:
        data.set_epoch(epoch)
        torch.rand(3)  # whatever else draws
        found.append(torch.cat([batch["pixel_values"] for batch in loader]))
    return found


@pytest.mark.parametrize(("workers", "persistent"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("size", [8, 96])
def test_augmentation_does_not_depend_on_workers(workers, persistent, size):
    preprocessing = Preprocessing((size, size), crop_pct=1.0)
    make = partial(as_pixel_dataset, arrow(), preprocessing, augmentation="crop-flip")
    expected = epochs_of(make(seed=3), 0)
    found = epochs_of(make(seed=3), workers, persistent)
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    # Later epochs alone, as after resuming, are the same; other epochs and seeds differ.
    assert torch.equal(epochs_of(make(seed=3), workers, epochs=[2])[0], expected[2])
    assert not torch.equal(expected[0], expected[1])
    assert not torch.equal(epochs_of(make(seed=4), 0, epochs=[0])[0], expected[0])


def test_augmentation_does_not_depend_on_what_was_read_before():
    data = as_pixel_dataset(arrow(), PREPROCESSING, augmentation="crop-flip")
    forwards = [data[i]["pixel_values"] for i in range(12)]
    backwards = [data[i]["pixel_values"] for i in reversed(range(12))][::-1]
    part = [data.select([4, 9])[i]["pixel_values"] for i in range(2)]
    assert all(torch.equal(*pair) for pair in zip(forwards, backwards, strict=True))
    assert torch.equal(part[0], forwards[4])
    assert torch.equal(part[1], forwards[9])


def test_reading_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    _ = as_pixel_dataset(arrow(), PREPROCESSING, augmentation="crop-flip")[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_views_have_epochs_of_their_own():
    """Evaluation on the training images goes through a data loader, which sets the epoch of its data set."""
    data = as_pixel_dataset(arrow(), PREPROCESSING, augmentation="crop")
    data.set_epoch(5)
    before = data[0]["pixel_values"]
    data.select([0], augmentation="none").set_epoch(0)
    assert torch.equal(data[0]["pixel_values"], before)


def test_random_transforms_of_the_source_are_keyed_too():
    class Transformed(Labelled):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return v2.RandomCrop(8, padding=4)(image), label

    data = as_pixel_dataset(Transformed(12), PREPROCESSING)
    first, second = epochs_of(data, 0, epochs=[0, 1])
    assert torch.equal(epochs_of(data, 2, epochs=[0])[0], first)
    assert not torch.equal(first, second)


def test_shifts_and_flips_are_uniform_over_images_and_epochs():
    """Chi-squared of 9 x 9 shifts and 2 flips over 60 images and 60 epochs, which is 161 +- 18 for fair draws."""
    ramp = torch.stack([torch.arange(32.0).expand(32, 32), torch.arange(32.0)[:, None].expand(32, 32)])
    image = torch.cat([ramp, ramp[:1]]) / 32 + 1 / 64
    data = as_pixel_dataset(Pairs([(image, 0)] * 60), Preprocessing((32, 32)), augmentation="crop-flip", seed=1)
    counts = np.zeros((2, 9, 9), int)
    for epoch in range(60):
        data.set_epoch(epoch)
        for i in range(60):
            made = (data[i]["pixel_values"] * 32 - 0.5).round()
            flipped = bool(made[0, 16, 16] < made[0, 16, 15])
            made = made.flip(-1) if flipped else made
            counts[int(flipped), int(made[0, 16, 16]) - 12, int(made[1, 16, 16]) - 12] += 1
    expected = 3600 / 162
    assert counts.min() > 0
    assert 161 - 4 * 18 < ((counts - expected) ** 2 / expected).sum() < 161 + 4 * 18


@pytest.mark.slow
def test_a_run_sees_the_same_pixels_whatever_reads_them(tmp_path):
    """And after resuming in the middle of a run."""

    def run(name, stop=None, resume=None, **changes):
        trainer = new_trainer(tmp_path / name, pictures(), kind=Spy, num_train_epochs=2, **changes)
        if stop:
            trainer.add_callback(StopAfter(stop))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.batches

    expected = run("plain")
    assert len(expected) == 6
    found = run("workers", dataloader_num_workers=1, dataloader_persistent_workers=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(expected, found, strict=True))
    run("parts", stop=1)
    found = run("parts", resume=True)
    assert len(found) == 3
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(expected[3:], found, strict=True))
    # The same images in both epochs, cropped in other ways.
    first, second = (torch.cat([a for _, a in part]).sum() for part in (expected[:3], expected[3:]))
    assert first != second


def test_the_transform_alone_still_draws_from_the_global_generator():
    transform = PixelTransform(Preprocessing((IMAGE_SIZE, IMAGE_SIZE)), "crop-flip")
    made = [transform(picture(0, (32, 32))) for _ in range(6)]
    assert any(not torch.equal(made[0], other) for other in made[1:])


def test_the_evaluation_leaves_broken_images_out(tmp_path):
    """And never puts another one in their place."""
    broken = {3: TRUNCATED, 7: EMPTY, 8: MISSING}
    data = as_pixel_dataset(spoiled_arrow(tmp_path, broken), PREPROCESSING, broken_images="skip")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 3))
    options = {"threat_model": ThreatModel(eps=0.01), "attack": "pgd", "progress": False}
    report = evaluate_robustness(model, data, **options)
    assert report.sample_indices == [i for i in range(12) if i not in broken]
    assert report.natural.total == report.robust.total == 9 and report.dataset_size == 12
    (warning,) = [text for text in report.warnings if "cannot be read" in text]
    assert "3 of 12 images" in warning and "image[3]" in warning and "left out" in warning
    with pytest.raises(BrokenImageError, match=r"image\[3\]"):
        evaluate_robustness(model, data, sample_indices=[0, 3], **options)
    spoiled = as_pixel_dataset(spoiled_arrow(tmp_path, dict.fromkeys(range(12), TEXT)), PREPROCESSING)
    with pytest.raises(BrokenImageError, match=r"12 of 12 images.*Nothing is left"):
        evaluate_robustness(model, spoiled, **options)
