"""Image towers as models: made, saved, loaded, published; data without labels; the command line."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from test_fare import arguments, logged, new_trainer
from tiny_towers import (
    IMAGE_SIZE,
    TOWERS,
    WIDTH,
    adapted,
    pictures,
    pixels,
    save_with_processor,
    tower,
    whole_clip,
)
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from transformers import (
    AutoImageProcessor,
    CLIPForImageClassification,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from autolora_hf import (
    AutoLoraTrainer,
    config_for,
    evaluate_robustness,
    export_onnx,
    get_autolora_model,
    load_autolora_model,
)
from autolora_hf.backbones import load_backbone
from autolora_hf.cli import main
from autolora_hf.data import as_pixel_dataset, as_pixel_stream
from autolora_hf.objectives import Fare
from autolora_hf.saving import save_plain


def embeddings_of(model, images=None):
    with torch.no_grad():
        return model.eval().pixel_space()(pixels() if images is None else images)


def of_transformers(network, model, images=None):
    """What a tower of transformers has for images, prepared as `model` says."""
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (model.preprocessing.mean, model.preprocessing.std))
    with torch.no_grad():
        output = network.eval()(((pixels() if images is None else images) - mean) / std)
    return output["image_embeds"] if "image_embeds" in output else output["pooler_output"]


def trained(model, seed=1):
    """`model` after every trainable weight has moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


# ---- models ----


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("mode", ["full", "adapter"])
def test_a_tower_is_a_model(kind, mode):
    network = tower(kind)
    heads = {"clip-pooled": ["post_layernorm"], "siglip": ["post_layernorm", "head.mlp.fc2"]}
    model = adapted(kind, mode=mode)
    wanted = of_transformers(network, model)
    torch.testing.assert_close(embeddings_of(model), wanted)
    assert model.num_classes == wanted.shape[1]
    assert model.autolora_config.heads == heads.get(kind, ["visual_projection"])
    assert model.routes == ("robust",)
    assert model.label_names is None
    # That of the image processor of its kind of model, though a vision configuration names none.
    assert model.preprocessing.mean[0] == pytest.approx(0.5 if kind == "siglip" else 0.48145466)
    assert model.preprocessing.image_size == (IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize("kind", TOWERS)
def test_mode_full_saves_an_ordinary_checkpoint(tmp_path, kind):
    model = trained(adapted(kind))
    model.save_pretrained(tmp_path)
    found, plain = load_autolora_model(tmp_path), type(tower(kind)).from_pretrained(tmp_path)
    assert torch.equal(embeddings_of(found), embeddings_of(model))
    torch.testing.assert_close(of_transformers(plain, model), embeddings_of(model))
    # And the folder is a backbone, with its preprocessing.
    again = get_autolora_model(str(tmp_path), config_for("fare"))
    torch.testing.assert_close(embeddings_of(again), embeddings_of(model))
    assert again.preprocessing == model.preprocessing
    assert again.backbone["architecture"] == type(plain).__name__
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.image_mean == pytest.approx(model.preprocessing.mean)


@pytest.mark.parametrize("kind", TOWERS)
def test_mode_adapter_saves_an_adapter_of_peft(tmp_path, kind):
    backbone = save_with_processor(tower(kind), tmp_path / "backbone")
    model = trained(get_autolora_model(backbone, config_for("fare", mode="adapter")))
    model.save_pretrained(tmp_path / "adapter")
    # Without `base_model`: by the recorded name.
    found = load_autolora_model(tmp_path / "adapter")
    assert torch.equal(embeddings_of(found), embeddings_of(model))
    stock = PeftModel.from_pretrained(tower(kind), str(tmp_path / "adapter"))
    torch.testing.assert_close(of_transformers(stock, model), embeddings_of(model))
    merged = found.merge_and_unload()
    torch.testing.assert_close(of_transformers(merged, model), embeddings_of(model), rtol=1e-4, atol=1e-5)


def test_exports(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason='needs `pip install "autolora-hf[onnx]"`')
    model = trained(adapted(mode="adapter"))
    save_plain(model, tmp_path / "plain")
    plain = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(of_transformers(plain, model), embeddings_of(model), rtol=1e-4, atol=1e-5)
    assert export_onnx(model, tmp_path / "tower.onnx").max_difference < 1e-4


def test_the_processor_of_a_folder_says_how_images_are_prepared(tmp_path):
    backbone = save_with_processor(tower(), tmp_path, mean=(0.1, 0.2, 0.3))
    assert get_autolora_model(backbone).preprocessing.mean == pytest.approx((0.1, 0.2, 0.3))


def test_a_whole_clip_has_an_image_half(tmp_path):
    whole = whole_clip()
    folder = save_with_processor(whole, tmp_path)
    network = load_backbone(folder, tower=True)
    assert type(network) is CLIPVisionModelWithProjection
    with torch.no_grad():
        wanted = whole.get_image_features(pixel_values=pixels())
    wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.pooler_output
    torch.testing.assert_close(network.eval()(pixels()).image_embeds, wanted)
    assert set(load_backbone(folder, tower=True, pretrained=False).state_dict()) == set(network.state_dict())

    # Without asking for it, a checkpoint of CLIP is made a classifier, as ever.
    assert type(load_backbone(folder, num_classes=3)) is CLIPForImageClassification

    model = trained(get_autolora_model(folder, config_for("fare", mode="adapter"), tower=True))
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(embeddings_of(load_autolora_model(tmp_path / "adapter")), embeddings_of(model))
    # A trainer with an objective of embeddings asks for it.
    trainer = AutoLoraTrainer(folder, arguments(tmp_path / "run"), pictures())
    assert trainer.model.num_classes == WIDTH


def test_a_whole_siglip_has_an_image_half(tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": IMAGE_SIZE, "patch_size": 8}
    SiglipModel(SiglipConfig(text_config={**text, "vocab_size": 50}, vision_config=vision)).save_pretrained(tmp_path)
    assert type(load_backbone(str(tmp_path), tower=True)) is SiglipVisionModel


def test_weights_that_are_missing_are_not_drawn(tmp_path):
    network = tower()
    network.save_pretrained(tmp_path, state_dict={k: v for k, v in network.state_dict().items() if "visual" not in k})
    with pytest.raises(ValueError, match=r"no weights for visual_projection\.weight of CLIP"):
        load_backbone(str(tmp_path))


def test_what_is_no_tower_is_refused_with_a_reason(tmp_path):
    folder = save_with_processor(tower(), tmp_path / "tower")
    with pytest.raises(ValueError, match="it gives embeddings of 12 values and cannot have 5 classes"):
        get_autolora_model(folder, num_classes=5)
    with pytest.raises(ValueError, match=r"takes images together with texts. Pass its image half alone: `CLIPVision"):
        get_autolora_model(whole_clip())
    with pytest.raises(ValueError, match="so there are no classes to name"):
        get_autolora_model(tower(), label_names=["name"] * WIDTH)
    encoder = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(ValueError, match="has no logits: it is not an image classifier"):
        get_autolora_model(encoder)
    with pytest.raises(AttributeError, match="logits"):
        evaluate_robustness(encoder, (torch.rand(2, 3, 224, 224), torch.zeros(2).long()), adapted().threat_model)
    from tiny_models import MODELS

    MODELS["hf_vit"].fresh().save_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="is no image tower but ViTForImageClassification"):
        load_backbone(str(tmp_path / "classifier"), tower=True)
    with pytest.raises(ValueError, match="for images of 32 x 32 pixels, and transformers does not adapt"):
        get_autolora_model(folder, image_size=30)


# ---- data without labels ----


class Tensors(Dataset):
    """Images alone, of any form."""

    def __init__(self, wrap):
        self.wrap, self.images = wrap, pixels(40)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.wrap(self.images[index])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(pixels(40))


def folder_of(root, names=("",)):
    for number, row in enumerate(pictures(40)):
        path = root / names[number % len(names)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    (root / "notes.txt").write_text("no image")
    return str(root)


SOURCES = {
    "image column": lambda root: pictures(40),
    "two columns": lambda root: pictures(40).add_column("caption", [f"picture {n}" for n in range(40)]),
    "folder": lambda root: folder_of(root / "flat"),
    "folders": lambda root: folder_of(root / "deep", ("a", "b/c", "")),
    "tensors": lambda root: Tensors(lambda image: image),
    "tuples of one": lambda root: TensorDataset(pixels(40)),
    "dictionaries": lambda root: Tensors(lambda image: {"pixel_values": image}),
    "a stream": lambda root: pictures(40).to_iterable_dataset(),
    "a torch stream": lambda root: Stream(),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_images_without_labels(tmp_path, kind):
    trainer = new_trainer(tmp_path / "run", train=SOURCES[kind](tmp_path), num_train_epochs=1)
    train, validation = trainer.train_dataset, trainer.eval_dataset
    assert len(train) + len(validation) == 40
    if "stream" not in kind:
        assert len(validation) == 8
    assert set(train.labels) == set(validation.labels) == {0}
    assert train.class_names is None
    trainer.train()
    assert np.isfinite(logged(trainer, "eval_loss")).all()


def test_labels_that_exist_play_no_part(tmp_path):
    labelled = pictures(40).add_column("label", ["a word"] * 39 + ["another"])
    trainer = new_trainer(tmp_path / "words", train=labelled, num_train_epochs=1)
    plain = new_trainer(tmp_path / "none", train=pictures(40), num_train_epochs=1)
    for one in (trainer, plain):
        one.train()
    assert logged(trainer, "eval_loss") == logged(plain, "eval_loss")
    assert trainer.model.label_names is None

    pairs = [(image, -1) for image in pixels(6)]
    data = as_pixel_dataset(pairs, adapted().preprocessing, labelled=False)
    assert data.labels == [0] * 6
    torch.testing.assert_close(data[2]["pixel_values"], pixels(6)[2], rtol=0, atol=1 / 255)


def test_unlabelled_data_are_checked_all_the_same(tmp_path):
    preprocessing = adapted().preprocessing
    root = Path(folder_of(tmp_path / "images"))
    (root / "broken.png").write_bytes(b"no image")
    trainer = new_trainer(tmp_path / "run", train=str(root), num_train_epochs=1, validation_fraction=0.5)
    trainer.train()
    with pytest.raises(ValueError, match="shares images with `train_dataset`"):
        AutoLoraTrainer(adapted(), arguments(tmp_path), pictures(40), pictures(40).select(range(10)))
    with pytest.raises(ValueError, match="are splits and not classes"):
        as_pixel_dataset(folder_of(tmp_path / "splits", ("train", "test")), preprocessing, labelled=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="contains no images"):
        as_pixel_dataset(str(tmp_path / "empty"), preprocessing, labelled=False)
    with pytest.raises(ValueError, match="no image column"):
        as_pixel_dataset(datasets.Dataset.from_dict({"text": ["a"]}), preprocessing, labelled=False)
    # Where labels count, they are still asked for.
    with pytest.raises(ValueError, match="no label column"):
        as_pixel_dataset(pictures(40), preprocessing)
    with pytest.raises(ValueError, match="no label column"):
        as_pixel_stream(pictures(40).to_iterable_dataset(), preprocessing)
    with pytest.raises(TypeError, match="must be pairs"):
        as_pixel_dataset(Tensors(lambda image: image), preprocessing)


def test_a_validation_set_of_ones_own(tmp_path):
    trainer = AutoLoraTrainer(adapted(), arguments(tmp_path, num_train_epochs=1), pictures(40), pictures(20, seed=5))
    trainer.train()
    assert trainer.plan["validation_images"] == 20
    objective = Fare()
    objective.prepare(adapted(), seed=0)
    assert objective.describe() == {"teacher_sha256": trainer.plan["teacher_sha256"]}


# ---- the command ----


@pytest.mark.parametrize("objective, mode", [("fare", "full"), ("fare", "adapter"), ("sim-clip", "full")])
def test_the_command(tmp_path, monkeypatch, capsys, objective, mode):
    monkeypatch.chdir(tmp_path)
    save_with_processor(whole_clip(), tmp_path / "clip")
    folder_of(tmp_path / "images")
    options = ["--model", "clip", "--train-data", "images", "--output_dir", "out", "--objective", objective]
    options += ["--mode", mode, "--num_train_epochs", "1", "--attack_steps", "2", "--eps", "4/255", "--use_cpu"]
    assert main(["train", *options, "--report_to", "none"]) == 0, capsys.readouterr().err
    assert "UNEXPECTED" not in capsys.readouterr().err
    plan = json.loads((tmp_path / "out/training_plan.json").read_text())
    assert plan["optimizer"] == "adamw_torch"
    assert plan["training_data"]["name"] == "images"
    model = load_autolora_model("out")
    assert model.training_plan["objective"] == objective
    assert embeddings_of(model).shape == (6, WIDTH)
    assert "image-feature-extraction" in (tmp_path / "out/README.md").read_text()
    # Test accuracy of embeddings is refused before any training.
    assert main(["train", *options, "--test-data", "images"]) == 1
    assert "so it has no accuracy" in capsys.readouterr().err


def test_the_command_goes_on_from_a_tower_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_with_processor(tower(), tmp_path / "tower")
    folder_of(tmp_path / "images")
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)).save(tmp_path / "images" / "black.png")
    options = ["--model", "tower", "--train-data", "images", "--output_dir", "out", "--num_train_epochs", "1"]
    options += ["--attack_steps", "1", "--use_cpu", "--report_to", "none"]
    assert main(["train", *options, "--objective", "fare"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["train", *options, "--objective", "pgd-at", "--train-data", str(tmp_path)]) == 1
    assert "is an image tower" in capsys.readouterr().err
