"""From a name to a model, what a model takes, and from a model to a record that rebuilds it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from timm.models import save_for_hf
from tiny_models import IMAGENET, MODELS, MODES
from torch import nn

from autolora_hf import AutoLoraConfig, Preprocessing, get_autolora_model, load_autolora_model
from autolora_hf.backbones import describe_backbone, label_names_of, load_backbone, rebuild_backbone
from autolora_hf.cli import main
from autolora_hf.inputs import (
    check_classifier,
    check_runs,
    library_of,
    native_size,
    num_classes_of,
    problem_at,
    resolve_preprocessing,
)


VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = {"image_size": 32, "patch_size": 8, "num_labels": 3, **VIT}
PERCEIVER = {
    "num_latents": 8,
    "d_latents": 16,
    "num_blocks": 1,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
    "num_labels": 3,
}
TOWERS = {
    "vision_config": {"image_size": 32, "patch_size": 8, **VIT},
    "text_config": {"vocab_size": 10, **VIT},
    "num_labels": 3,
}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "num_labels": 3,
}


def hf(kind: str, config: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**arguments)).eval()


def wrapped(architecture: str = "test_vit", num_labels: int = 3, **model_args) -> nn.Module:
    """A timm network inside transformers' wrapper."""
    arguments = {"architecture": architecture, "num_labels": num_labels, "model_args": model_args}
    return hf("TimmWrapperForImageClassification", "TimmWrapperConfig", **arguments)


def on_meta(name: str, **arguments) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=3, **arguments).eval()


def saved_timm(folder: Path, name: str, **arguments) -> str:
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 3, **arguments})
    save_for_hf(model, str(folder), safe_serialization=True, model_config={"label_names": ["ant", "bee", "cat"]})
    return str(folder)


def test_what_the_refusal_of_pickled_weights_advises_is_loaded(tmp_path):
    """timm pickles unless it is told not to."""
    network = timm.create_model("test_resnet", num_classes=3)
    save_for_hf(network, str(tmp_path), model_config={"num_classes": 3})
    with pytest.raises(ValueError, match=r"`timm.models.save_for_hf\(model, folder, safe_serialization=True\)` write"):
        get_autolora_model(str(tmp_path))
    save_for_hf(network, str(tmp_path), model_config={"num_classes": 3}, safe_serialization=True)
    get_autolora_model(str(tmp_path))


# ---- image size and preprocessing of timm models ----


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("vit_tiny_patch16_224", {}, (224, 224)),
        ("vit_tiny_patch16_224", {"img_size": 96}, (96, 96)),
        ("vit_tiny_patch16_224", {"img_size": (64, 96)}, (64, 96)),
        ("vit_tiny_patch16_224", {"img_size": 96, "dynamic_img_size": True}, (96, 96)),
        ("vit_small_patch14_dinov2", {}, (518, 518)),
        ("swin_tiny_patch4_window7_224", {"img_size": 256}, (256, 256)),
        ("swinv2_tiny_window8_256", {}, (256, 256)),
        ("hiera_tiny_224", {}, (224, 224)),
        ("samvit_base_patch16_224", {}, (224, 224)),
        ("naflexvit_base_patch16_gap", {}, (384, 384)),
        ("mobilevit_xxs", {}, (256, 256)),
        ("crossvit_tiny_240", {}, (240, 240)),
        ("visformer_tiny", {"img_size": 96}, (96, 96)),
        ("mixer_s32_224", {"img_size": 96}, (96, 96)),
        ("maxvit_pico_rw_256", {"img_size": 128}, (128, 128)),
        ("levit_128s", {}, (224, 224)),
        ("nest_tiny", {"img_size": 112}, (112, 112)),
        ("coat_lite_tiny", {"img_size": 96}, (96, 96)),
        ("pit_ti_224", {"img_size": 96}, (96, 96)),
        ("volo_d1_224", {"img_size": 96}, (96, 96)),
        ("botnet26t_256", {"img_size": 128}, (128, 128)),
        ("legacy_xception", {}, (299, 299)),
    ],
)
def test_a_timm_model_gets_images_of_the_size_it_was_built_for(name, arguments, size):
    model = on_meta(name, **arguments)
    assert resolve_preprocessing(model).image_size == size
    assert problem_at(model, size) is None


def test_a_timm_model_that_is_set_to_another_size():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    model.set_input_size(img_size=64)
    assert resolve_preprocessing(model).image_size == (64, 64)


@pytest.mark.parametrize(
    ("name", "mean", "interpolation", "crop_pct"),
    [
        ("tf_efficientnet_b0.in1k", 0.485, "bicubic", 0.875),
        ("tf_efficientnet_b0.ap_in1k", 0.5, "bicubic", 0.875),
        ("inception_v3.tf_in1k", 0.5, "bicubic", 0.875),
        ("res2net50_14w_8s", 0.485, "bilinear", 0.875),
        ("mobilevit_xxs", 0.0, "bicubic", 0.9),
    ],
)
def test_normalisation_of_timm_checkpoints(name, mean, interpolation, crop_pct):
    preprocessing = resolve_preprocessing(on_meta(name))
    assert preprocessing.mean[0] == mean
    assert (preprocessing.interpolation, preprocessing.crop_pct) == (interpolation, crop_pct)
    expected = timm.data.resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    assert preprocessing.to_timm() == {key: expected[key] for key in preprocessing.to_timm()}


# ---- image size and preprocessing of transformers models ----


@pytest.mark.parametrize(
    ("model", "size", "order"),
    [
        (lambda: hf("ViTForImageClassification", "ViTConfig", **SMALL), (32, 32), "rgb"),
        (lambda: hf("CLIPForImageClassification", "CLIPConfig", **TOWERS), (32, 32), "rgb"),
        (lambda: hf("SiglipForImageClassification", "SiglipConfig", **TOWERS), (32, 32), "rgb"),
        (lambda: hf("Dinov2ForImageClassification", "Dinov2Config", **SMALL), (32, 32), "rgb"),
        (lambda: hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", **SMALL), (32, 32), "rgb"),
        (lambda: hf("PPLCNetForImageClassification", "PPLCNetConfig", num_labels=3), (224, 224), "bgr"),
        # No processor is known for these.
        (lambda: hf("HGNetV2ForImageClassification", "HGNetV2Config", num_labels=3), (224, 224), "rgb"),
        (
            lambda: hf("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **SMALL),
            (32, 32),
            "rgb",
        ),
        # Its processor keeps the shape of an image.
        (lambda: hf("TextNetForImageClassification", "TextNetConfig", image_size=(64, 96)), (64, 96), "rgb"),
        (
            lambda: hf(
                "PerceiverForImageClassificationLearned", "PerceiverConfig", d_model=512, image_size=32, **PERCEIVER
            ),
            (32, 32),
            "rgb",
        ),
        (
            lambda: hf("PerceiverForImageClassificationFourier", "PerceiverConfig", d_model=261, **PERCEIVER),
            (56, 56),
            "rgb",
        ),
    ],
)
def test_a_transformers_model_gets_images_of_a_size_that_it_takes(model, size, order, caplog):
    model = model()
    with caplog.at_level(logging.WARNING, "autolora_hf"):
        preprocessing = resolve_preprocessing(model)
    assert (preprocessing.image_size, preprocessing.channel_order) == (size, order)
    check_runs(model, torch.zeros(1, 3, *size))
    assert "no saved image processor" in caplog.text and "preprocessing=Preprocessing(...)" in caplog.text
    record = json.loads(json.dumps(describe_backbone(model, None)))
    rebuilt = rebuild_backbone(record)
    assert type(rebuilt) is type(model) and num_classes_of(rebuilt) == num_classes_of(model)


def test_stand_in_for_a_processor_that_no_preprocessing_describes():
    processor = transformers.DonutImageProcessorPil(size={"height": 64, "width": 48})
    preprocessing = Preprocessing.assumed(processor)
    assert preprocessing == Preprocessing(
        (64, 48), (0.5,) * 3, (0.5,) * 3, "bilinear", crop_pct=1.0, crop_mode="border"
    )
    assert Preprocessing.assumed(None, (96, 96)) == Preprocessing((96, 96))


@pytest.mark.parametrize("saved", [32, 48])
def test_size_of_a_checkpoint_whose_network_takes_one_size(tmp_path, saved):
    hf("ViTForImageClassification", "ViTConfig", **SMALL).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": saved, "width": saved}).save_pretrained(tmp_path)
    model = load_backbone(str(tmp_path))
    assert resolve_preprocessing(model, str(tmp_path)).image_size == (32, 32)


def test_the_processor_of_a_checkpoint_that_takes_any_size_wins(tmp_path):
    hf("Dinov2ForImageClassification", "Dinov2Config", **{**SMALL, "image_size": 64}).save_pretrained(tmp_path)
    transformers.BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path
    )
    preprocessing = resolve_preprocessing(load_backbone(str(tmp_path)))
    assert preprocessing.image_size == (32, 32)
    assert preprocessing.crop_pct == pytest.approx(32 / 48)


# ---- timm models in transformers' wrapper ----


@pytest.mark.parametrize("mode", MODES)
def test_a_wrapped_timm_model_works_like_any_other(tmp_path, mode):
    model = wrapped(img_size=32, depth=2)
    assert library_of(model) == "transformers" and label_names_of(model) is None
    adapted = get_autolora_model(model, AutoLoraConfig(mode=mode)).eval()
    assert adapted.preprocessing == Preprocessing.from_timm(model.timm_model)
    assert adapted.preprocessing.image_size == (32, 32)
    assert adapted.autolora_config.head == "timm_model.head"
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path)
    base = None if mode == "full" else wrapped(img_size=32, depth=2)
    loaded = load_autolora_model(tmp_path, base_model=base)
    images = torch.rand(2, 3, 32, 32)
    for route in ("robust", "natural"):
        assert torch.equal(adapted.pixel_space(route)(images), loaded.pixel_space(route)(images))
    if mode == "full":
        stock = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        normalised = adapted.pixel_space().normalize(images)
        assert torch.equal(stock(normalised).logits, adapted.pixel_space()(images))


@pytest.mark.parametrize("mode", MODES)
def test_a_wrapper_of_a_timm_checkpoint(tmp_path, mode):
    changes = {"mean": (0.1, 0.2, 0.3), "input_size": (3, 64, 64)}
    folder = saved_timm(tmp_path / "timm", "test_resnet", pretrained_cfg_overlay=changes)
    # timm writes the number of classes a second time, which transformers alone cannot load.
    assert json.loads(Path(folder, "config.json").read_text())["model_args"]["num_classes"] == 3
    model = load_backbone(folder, library="transformers")
    assert type(model).__name__ == "TimmWrapperForImageClassification"
    adapted = get_autolora_model(model, AutoLoraConfig(mode=mode)).eval()
    assert adapted.preprocessing.mean == (0.1, 0.2, 0.3) and adapted.preprocessing.image_size == (64, 64)
    assert adapted.label_names == ["ant", "bee", "cat"] and adapted.num_classes == 3
    adapted.save_pretrained(tmp_path / "out")
    # The base of the adapter is found by its name, and becomes a wrapper again.
    loaded = load_autolora_model(tmp_path / "out")
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(adapted.pixel_space()(images), loaded.pixel_space()(images))
    # Folders that the wrapper itself saved.
    load_backbone(folder, library="transformers").save_pretrained(tmp_path / "wrapper")
    again = load_backbone(str(tmp_path / "wrapper"), num_classes=5)
    assert type(again) is type(model) and num_classes_of(again) == 5


# ---- images of another size ----


@pytest.mark.parametrize(
    ("name", "arguments", "size", "built_for", "resampled"),
    [
        ("test_vit", {"img_size": 32, "dynamic_img_size": False}, 64, (64, 64), ["pos_embed"]),
        ("test_vit", {"img_size": 32, "dynamic_img_size": False}, (32, 64), (32, 64), ["pos_embed"]),
        ("test_vit", {"img_size": 32, "dynamic_img_size": False}, 32, (32, 32), []),
        # It takes any size, and timm recommends that of the weights it was made from.
        ("test_vit", {"img_size": 32, "dynamic_img_size": True}, (48, 64), (160, 160), []),
        ("test_resnet", {}, (64, 96), (160, 160), []),
        ("test_efficientnet", {}, 33, (160, 160), []),
        # timm makes it for another size but does not resample its weights; it also takes other sizes as it is.
        ("samvit_base_patch16_224", {"depth": 1, "embed_dim": 16, "num_heads": 1}, 256, (224, 224), []),
    ],
)
def test_timm_checkpoints_at_another_size(tmp_path, name, arguments, size, built_for, resampled):
    folder = saved_timm(tmp_path, name, **arguments)
    model = load_backbone(folder, image_size=size)
    size = (size, size) if isinstance(size, int) else size
    assert native_size(model) == built_for
    check_runs(model, torch.zeros(1, 3, *size))
    record = describe_backbone(model, folder, image_size=size)
    assert record["image_size"] == list(size) and record["resampled"] == resampled
    assert native_size(rebuild_backbone(record)) == built_for
    weights, kept = load_backbone(folder).state_dict(), model.state_dict()
    assert all(torch.equal(kept[key], weights[key]) for key in weights if key not in resampled)


def test_position_embeddings_are_resampled_and_not_made_afresh(tmp_path):
    folder = saved_timm(tmp_path, "test_vit", img_size=32, dynamic_img_size=False)
    model, original = load_backbone(folder, image_size=64), load_backbone(folder)
    expected = timm.layers.resample_abs_pos_embed(original.pos_embed, (4, 4), num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed, expected)


@pytest.mark.parametrize("mode", MODES)
def test_round_trip_of_a_model_at_another_size(tmp_path, mode):
    folder = saved_timm(tmp_path / "base", "test_vit", img_size=32, dynamic_img_size=False, depth=2)
    model = get_autolora_model(folder, AutoLoraConfig(mode=mode), image_size=(32, 64)).eval()
    assert model.preprocessing.image_size == (32, 64)
    images = torch.rand(2, 3, 32, 64)
    for number in range(2):  # the second time from what was loaded
        model.save_pretrained(tmp_path / str(number))
        loaded = load_autolora_model(tmp_path / str(number))
        assert torch.equal(model.pixel_space()(images), loaded.pixel_space()(images))
        assert loaded.preprocessing == model.preprocessing
        model = loaded


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_stock_loaders_of_a_saved_model_prepare_images_as_it_was_trained(tmp_path, name):
    folder = saved_timm(tmp_path / "base", name)
    model = get_autolora_model(folder, image_size=(64, 96)).eval()
    model.save_pretrained(tmp_path / "out")
    images = torch.rand(1, 3, 64, 96)
    normalised, expected = model.pixel_space().normalize(images), model.pixel_space()(images)
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert timm.data.resolve_model_data_config(stock)["input_size"] == (3, 64, 96)
    torch.testing.assert_close(stock(normalised), expected)
    wrapper = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert resolve_preprocessing(wrapper) == resolve_preprocessing(stock) == model.preprocessing
    torch.testing.assert_close(wrapper(normalised).logits, expected)


def test_image_size_of_a_given_model_only_resizes():
    model = get_autolora_model(MODELS["timm_resnet"].fresh(), preprocessing=IMAGENET, image_size=(48, 64))
    assert model.preprocessing == Preprocessing((48, 64), crop_pct=1.0)
    assert model.pixel_space()(torch.rand(1, 3, 48, 64)).shape == (1, 4)


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (lambda: on_meta("vit_tiny_patch16_224"), 64, "VisionTransformer takes only images of 224 x 224 pixels, not"),
        (lambda: on_meta("hrnet_w18_small"), 100, "HighResolutionNet does not run on images of 100 x 100 pixels"),
        (lambda: MODELS["hf_vit"].fresh(), (32, 64), "ViTForImageClassification does not run on images of 32 x 64"),
        (lambda: wrapped(img_size=32, dynamic_img_size=False), 64, "does not run on images of 64 x 64 pixels"),
    ],
)
def test_a_given_model_that_cannot_run_at_a_size(model, size, message):
    with pytest.raises(ValueError) as error:
        get_autolora_model(model(), image_size=size)
    assert message in str(error.value)


@pytest.mark.parametrize("size", [0, -3, (32,), (32, 32, 3), 32.5, (32, 0)])
def test_what_is_no_image_size(size):
    with pytest.raises((ValueError, TypeError), match=r"image_size|iterable"):
        get_autolora_model(MODELS["timm_resnet"].fresh(), image_size=size)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("levit_128s", 227, "LevitDistilled takes only images of 224 x 224 pixels, not 227 x 227"),
        ("hrnet_w18_small", 100, "does not run on images of 100 x 100 pixels"),
    ],
)
def test_timm_names_are_refused_before_the_download(name, size, message):
    with pytest.raises(ValueError) as error:
        load_backbone(name, image_size=size)
    assert message in str(error.value)


def test_timm_weights_that_are_not_resampled(tmp_path):
    folder = saved_timm(tmp_path, "pit_ti_224")
    with pytest.raises(ValueError, match=r"for images of 224 x 224 pixels only: timm does not adapt .* to 256 x 256"):
        load_backbone(folder, image_size=256)
    assert native_size(load_backbone(folder, image_size=256, pretrained=False)) == (256, 256)


@pytest.mark.parametrize("size", [64, (32, 64)])
def test_transformers_checkpoints_at_another_size(tmp_path, size):
    pair = (size, size) if isinstance(size, int) else size
    models = {
        "swin": hf("SwinForImageClassification", "SwinConfig", **SWIN),
        "dinov2": hf("Dinov2ForImageClassification", "Dinov2Config", **SMALL),
        "resnet": MODELS["hf_resnet"].fresh(),
        "vit": MODELS["hf_vit"].fresh(),
        "wrapper": wrapped(img_size=32, dynamic_img_size=False),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        if name in ("vit", "wrapper"):
            with pytest.raises(ValueError, match=r"transformers does not adapt .*\.pos\w*embed\w* to"):
                load_backbone(str(tmp_path / name), image_size=size)
        else:
            loaded = load_backbone(str(tmp_path / name), 5, image_size=size)
            check_runs(loaded, torch.zeros(1, 3, *pair))
            kept = loaded.state_dict()
            different = [key for key, value in model.state_dict().items() if not torch.equal(kept[key], value)]
            assert all(key.startswith("classifier") for key in different), name
    assert native_size(load_backbone(str(tmp_path / "vit"), image_size=size, pretrained=False)) == pair


def test_image_size_on_the_command_line(tmp_path, monkeypatch):
    asked = []

    def stop(*arguments, **keywords):
        asked.append(keywords["image_size"])
        raise ValueError("enough")

    monkeypatch.setattr("autolora_hf.cli.train.open_data", lambda *_: [(np.zeros((8, 8), np.uint8), 0)])
    monkeypatch.setattr("autolora_hf.cli.train.get_autolora_model", stop)
    options = f"train --model x --train-data digits --train-split train --output_dir {tmp_path}".split()
    for extra in ([], ["--image-size", "96"], ["--image_size", "96", "128"]):
        assert main([*options, *extra]) == 1
    assert asked == [None, 96, [96, 128]]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        (
            lambda: hf(
                "ImageGPTForImageClassification",
                "ImageGPTConfig",
                vocab_size=9,
                n_positions=16,
                n_embd=8,
                n_layer=1,
                n_head=1,
            ),
            ["ImageGPTForImageClassification", "colour-cluster"],
        ),
        (
            lambda: hf(
                "Siglip2ForImageClassification",
                "Siglip2Config",
                vision_config={"num_patches": 16, "patch_size": 8, **VIT},
                text_config={"vocab_size": 10, **VIT},
            ),
            ["Siglip2ForImageClassification", "patches", "SiglipForImageClassification"],
        ),
        (lambda: timm.create_model("test_resnet", in_chans=1), ["ResNet takes images of 1 channel;", "RGB"]),
        (lambda: timm.create_model("test_vit", in_chans=4), ["takes images of 4 channels", "RGB"]),
        (lambda: wrapped(in_chans=1), ["takes images of 1 channel;", "RGB"]),
        (lambda: hf("ViTForImageClassification", "ViTConfig", num_channels=1, **SMALL), ["1 channel;", "RGB"]),
        (lambda: timm.create_model("test_resnet", num_classes=0), ["no classifier", "num_classes=...", "num_labels"]),
        (
            lambda: hf("ViTForImageClassification", "ViTConfig", **{**SMALL, "num_labels": 0}),
            ["no classifier", "num_labels"],
        ),
        (lambda: hf("ViTModel", "ViTConfig", **SMALL), ["ViTModel", "no logits: it is not an image classifier"]),
    ],
)
def test_other_inputs_and_outputs_are_refused(model, messages):
    model = model()
    with pytest.raises(ValueError) as error:
        get_autolora_model(model)
    assert all(message in str(error.value) for message in messages), str(error.value)


def test_shieldgemma_is_refused():
    with torch.device("meta"):
        model = transformers.ShieldGemma2ForImageClassification(
            transformers.ShieldGemma2Config(
                text_config={**VIT, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 300_000},
                vision_config={**VIT, "image_size": 32, "patch_size": 8},
                mm_tokens_per_image=4,
            )
        )
    with pytest.raises(ValueError, match="together with a text prompt"):
        check_classifier(model)


def test_a_replaced_classifier_needs_its_number_of_classes():
    model = timm.create_model("test_resnet", num_classes=3)
    model.fc = nn.Linear(model.fc.in_features, 7)
    with pytest.raises(ValueError, match=r"\(1, 7\) for one image, but `model.num_classes` is 3"):
        get_autolora_model(model, preprocessing=IMAGENET)
    model.num_classes = 7
    assert get_autolora_model(model, preprocessing=IMAGENET).num_classes == 7


def test_a_failing_model_is_not_blamed_on_the_image_size():
    model = timm.create_model("test_resnet", num_classes=3)
    model.layer1[0].conv1 = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="ResNet cannot classify an image of 32 x 32 pixels"):
        get_autolora_model(model, preprocessing=IMAGENET)
