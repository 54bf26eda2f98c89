"""Images and labels that make no sense are refused by name, with what was found, by the trainer and the evaluation."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import Pairs
from test_trainer import NAMES, arguments, pictures
from tiny_models import IMAGE_SIZE, MODELS

from autolora_hf import AutoLoraTrainer, evaluate_robustness
from autolora_hf.attacks import PGD
from autolora_hf.config import ThreatModel


def with_nan():
    pixels = torch.rand(3, IMAGE_SIZE, IMAGE_SIZE)
    pixels[1, 2, 3] = float("nan")
    return pixels


SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
BAD_IMAGES = {
    "normalised": (torch.linspace(-2, 2, 3 * IMAGE_SIZE**2).view(SHAPE), ["from -2 to 2", "normalised"]),
    "8-bit values": (torch.linspace(0, 255, 3 * IMAGE_SIZE**2).view(SHAPE), ["from 0 to 255", "divide by 255"]),
    "uint8 tensor": (torch.zeros(SHAPE, dtype=torch.uint8), ["uint8", "from 0 to 0", "/ 255"]),
    "NaN": (with_nan(), ["NaN", "1 of 3072"]),
    "another size": (torch.rand(3, 8, 8), [f"{IMAGE_SIZE} x {IMAGE_SIZE}", "8 x 8"]),
    "channels last": (torch.rand(IMAGE_SIZE, IMAGE_SIZE, 3), ["(32, 32, 3)", "3 x H x W"]),
    "float picture": (Image.fromarray(np.full((9, 9), 7.5, np.float32)), ["float image", "from 7.5 to 7.5"]),
    "name of a file": ("cat.png", ["PIL image", "got str"]),
}


class Pictures(Pairs):
    """The usual pictures, one of them replaced by something else."""

    def __init__(self, row, image, count=60):
        super().__init__([(sample["image"], sample["label"]) for sample in pictures(count)])
        self.targets = [label for _, label in self.items]
        self.items[row] = (image, self.targets[row])


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 0) for kind in BAD_IMAGES), ("normalised", 1)])
def test_the_trainer_refuses_bad_images(tmp_path, kind, workers):
    image, messages = BAD_IMAGES[kind]
    options = {"num_train_epochs": 1, "dataloader_num_workers": workers}
    model = MODELS["hf_vit"].adapted(num_classes=3)
    validation = pictures(12, seed=1)
    with pytest.raises((ValueError, TypeError)) as error:
        trainer = AutoLoraTrainer(model, arguments(tmp_path, **options), Pictures(7, image), validation)
        trainer.train()
    for message in ["`image[7] of train_dataset`", *messages]:
        assert message in str(error.value)
    # Nothing had been trained.
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises((ValueError, TypeError)) as error:
        AutoLoraTrainer(model, arguments(tmp_path, **options), pictures(12, seed=1), Pictures(7, image))
    for message in ["`image[7] of eval_dataset`", *messages]:
        assert message in str(error.value)


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_the_evaluation_refuses_bad_images(kind):
    image, messages = BAD_IMAGES[kind]
    model = MODELS["hf_vit"].adapted(num_classes=3).eval()
    attack = PGD(ThreatModel(), steps=1)
    with pytest.raises((ValueError, TypeError)) as error:
        evaluate_robustness(model, Pictures(7, image, count=12), ThreatModel(), attack, progress=False)
    for message in ["`image[7] of dataset`", *messages]:
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("mode", "size"), [("L", (20, 30)), ("RGBA", (40, 32)), ("P", (7, 50)), ("I;16", (32, 32)), ("1", (1, 1))]
)
def test_the_trainer_converts_what_it_can(tmp_path, mode, size):
    """Grey, transparent, 16-bit and bilevel pictures of any size."""
    images = [row["image"].resize(size).convert("L" if mode == "I;16" else mode) for row in pictures(24)]
    if mode == "I;16":
        images = [Image.fromarray(np.asarray(image).astype(np.uint16) * 257) for image in images]
    items = [(image, i % 3) for i, image in enumerate(images)]
    train = Pairs([(image, label) for image, label in items])
    args = arguments(tmp_path, num_train_epochs=1, attack_steps=1, eval_attack_steps=1)
    if size == (1, 1):
        # All 24 pictures are copies of two.
        with pytest.raises(ValueError, match="shares images"):
            AutoLoraTrainer(MODELS["hf_vit"].adapted(num_classes=3), args, train, Pairs(items[:6]))
        return
    trainer = AutoLoraTrainer(MODELS["hf_vit"].adapted(num_classes=3), args, train)
    trainer.train()
    assert trainer.state.global_step > 0


def labelled(labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": pictures()["image"][: len(labels)], "label": labels}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize(
    ("dataset", "messages"),
    [
        (lambda: labelled([0, 1, 2, 7] * 3), ["3 of 12 labels", "outside 0 .. 2", "7 (3 x)"]),
        (lambda: labelled([0, 1, -1] * 4), ["4 of 12 labels", "-1 (4 x)"]),
        (lambda: pictures().remove_columns("label"), ["no label column", "image (Image)"]),
        (lambda: pictures().remove_columns("image"), ["no image column", "label (ClassLabel)"]),
        (lambda: pictures().select([]), ["is empty"]),
        (lambda: datasets.DatasetDict(test=pictures()), ["DatasetDict", "dataset['test']"]),
    ],
    ids=["outside", "negative", "no labels", "no images", "empty", "dict"],
)
def test_the_evaluation_refuses_bad_labels_and_columns(dataset, messages):
    model = MODELS["hf_vit"].adapted(num_classes=3).eval()
    with pytest.raises(ValueError) as error:
        evaluate_robustness(model, dataset(), ThreatModel(), "pgd", progress=False)
    for message in messages:
        assert message in str(error.value)


def test_class_names_of_another_order(tmp_path):
    trainer = AutoLoraTrainer(MODELS["hf_vit"].adapted(num_classes=3), arguments(tmp_path), pictures())
    other = pictures(9, seed=5).cast_column("label", datasets.ClassLabel(names=NAMES[::-1]))
    with pytest.raises(ValueError, match=r"dataset has other classes .* label 0 is 'square' there and 'circle' here"):
        trainer.evaluate_robustness(other, attack="pgd")
