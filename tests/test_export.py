"""ONNX export: the file computes what the model does, from pixels, and is there whole or not at all."""

import importlib.util
import json
import logging
import sys
import types

import pytest
import timm
import torch
from tiny_models import IMAGE_SIZE, MODELS, change_everything, pixels
from torch import nn

import autolora_hf
from autolora_hf import Preprocessing, ThreatModel, get_autolora_model
from autolora_hf.cli import export as command
from autolora_hf.frozen import FrozenRoute
from autolora_hf.hub import export as export_module
from autolora_hf.hub.export import export_onnx


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
        reason='needs `pip install "autolora-hf[onnx]"`',
    ),
]

# The quickest one to export.
QUICK = "hf_resnet"

VARIANTS = [(name, *pair) for name in MODELS for pair in (("full", "robust"), ("adapter", "natural"))]
VARIANTS += [(QUICK, "full", "natural"), (QUICK, "adapter", "robust")]


def changed(name=QUICK, **config):
    model = MODELS[name].adapted(**config)
    change_everything(model)
    return model


def in_onnxruntime(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"pixels": images.numpy()})[0])


def relative(found, expected):
    """Largest difference, relative to the largest logit if that is above 1."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def state_of(model):
    """Everything a caller could notice, in a form that compares with `==`."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "weights": {name: tensor.detach().clone().numpy().tobytes() for name, tensor in tensors.items()},
        "gradients": {
            name: None if p.grad is None else p.grad.clone().numpy().tobytes() for name, p in model.named_parameters()
        },
        "identities": [id(tensor) for tensor in tensors.values()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "route": model.current_route,
        "random": torch.get_rng_state().numpy().tobytes(),
    }


# --- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode", "route"), VARIANTS)
def test_same_logits_for_any_number_of_images(name, mode, route, tmp_path):
    # Separate statistics for the natural route are a matter of models with BatchNorm.
    model = changed(name, mode=mode, norm="dual" if MODELS[name].batch_norm else "shared")
    path = tmp_path / "new" / "model.onnx"
    export = export_onnx(model, path, route=route)
    for count in (1, 3, 9):
        images = pixels(count, seed=count)
        with torch.no_grad():
            expected = model.pixel_space(route)(images)
            other = model.pixel_space("natural" if route == "robust" else "robust")(images)
        found = in_onnxruntime(path, images)
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert relative(found, expected) < 1e-5
        assert relative(found, other) > 1e-3
    assert export.max_difference < 1e-5
    assert (export.path, export.images_checked, export.bytes) == (path, 8, path.stat().st_size)
    # One file, with the weights of the backbone and nothing of the other route.
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    backbone = sum(parameter.numel() for parameter in MODELS[name].fresh().parameters())
    assert export.bytes < 4 * backbone + 60_000


def test_normalisation_and_order_of_channels_are_inside(tmp_path):
    wanted = Preprocessing((IMAGE_SIZE,) * 2, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), channel_order="bgr")
    model = get_autolora_model(MODELS[QUICK].fresh(), preprocessing=wanted)
    export_onnx(model, tmp_path / "model.onnx")
    images = pixels()
    normalised = (images - torch.tensor(wanted.mean).view(3, 1, 1)) / torch.tensor(wanted.std).view(3, 1, 1)
    with torch.no_grad():
        expected, wrong = (MODELS[QUICK].fresh()(batch).logits for batch in (normalised.flip(1), normalised))
    found = in_onnxruntime(tmp_path / "model.onnx", images)
    assert relative(found, expected) < 1e-5
    assert relative(found, wrong) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype, tmp_path):
    model = changed(mode="adapter").to(dtype)
    export_onnx(model, tmp_path / "model.onnx")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        expected = model.float().pixel_space()(pixels())
    assert relative(in_onnxruntime(tmp_path / "model.onnx", pixels()), expected) < 1e-5


def test_forward_of_mixed_precision_is_left_out(tmp_path):
    """Training with accelerate replaces the forward of the instance by one that rounds."""
    model = changed()
    expected = model.pixel_space()(pixels()).detach()
    rounding = type(model).forward
    model.forward = types.MethodType(lambda self, images: rounding(self, images.bfloat16().float()).logits, model)
    export_onnx(model, tmp_path / "model.onnx")
    assert relative(in_onnxruntime(tmp_path / "model.onnx", pixels()), expected) < 1e-5


def test_opset(tmp_path):
    import onnx

    assert export_onnx(changed(), tmp_path / "model.onnx", opset=18).opset == 18
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 18
    with pytest.raises(
        ValueError, match="ViTForImageClassification cannot be exported to ONNX opset 13, only to"
    ) as e:
        export_onnx(changed("hf_vit"), tmp_path / "old.onnx", opset=13)
    assert "opset 18" in str(e.value)
    assert not (tmp_path / "old.onnx").exists()


# --- the file and the model ------------------------------------------------------------------------------------------


def test_metadata(tmp_path):
    import onnx

    model = get_autolora_model(
        MODELS[QUICK].fresh(2),
        preprocessing=Preprocessing((32, 48), crop_pct=0.9),
        label_names=["Zilpzalp", "Kleiber \N{BIRD}"],
        threat_model=ThreatModel("l2", 0.5),
    )
    path = tmp_path / "model.onnx"
    path.write_text("an older file")
    export_onnx(model, path, route="natural")
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    found = {entry.key: entry.value for entry in proto.metadata_props}
    assert found.pop("autolora_hf_version") == autolora_hf.__version__
    assert found.pop("route") == "natural"
    assert {name: json.loads(text) for name, text in found.items()} == {
        "threat_model": {"norm": "l2", "eps": 0.5},
        "image_size": [32, 48],
        "class_names": ["Zilpzalp", "Kleiber \N{BIRD}"],
        "resize": {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"},
    }
    for value, name, shape in (
        (proto.graph.input, "pixels", ["N", 3, 32, 48]),
        (proto.graph.output, "logits", ["N", 2]),
    ):
        assert [entry.name for entry in value] == [name]
        kind = value[0].type.tensor_type
        assert kind.elem_type == onnx.TensorProto.FLOAT
        assert [dimension.dim_param or dimension.dim_value for dimension in kind.shape.dim] == shape


def test_nothing_is_printed_and_the_file_knows_nothing_of_this_machine(tmp_path, capfd, caplog):
    """The exporter prints its progress, and notes the source file behind every node."""
    export_onnx(changed(), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    content = (tmp_path / "model.onnx").read_bytes()
    assert b".py" not in content and b"stack_trace" not in content


@pytest.mark.parametrize(("mode", "route"), [("full", "robust"), ("adapter", "natural")])
def test_the_model_stays_as_it_is(mode, route, tmp_path):
    model = changed(mode=mode, norm="dual")
    with model.route("natural"):
        model.pixel_space("natural")(pixels()).square().sum().backward()
        model.train()
        model.get_base_model().resnet.eval()
        before = state_of(model)
        assert any(before["gradients"].values()) and before["route"] == "natural"
        export_onnx(model, tmp_path / "model.onnx", route=route)
        assert state_of(model) == before


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program():
    return export_module._traced(FrozenRoute(changed()), "ResNet", (IMAGE_SIZE,) * 2, None)


@pytest.fixture
def wrong_result(monkeypatch, program):
    """Makes onnxruntime return other logits: `wrong_result(change)` of (pixels, logits)."""
    right = export_module._runner

    def install(change):
        def runner(content, kind):
            run = right(content, kind)
            return lambda images: change(images, run(images))

        monkeypatch.setattr(export_module, "_runner", runner)
        monkeypatch.setattr(export_module, "_traced", lambda *args: program)  # tracing takes seconds

    return install


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images, logits: logits + 1e-2, "differs from the model: by 0.0"),
        (lambda images, logits: logits + 1e-2 * (images.amax((1, 2, 3)) == 0)[:, None], "differs"),  # the black image
        (lambda images, logits: logits + 1e-2 * (images.amin((1, 2, 3)) == 1)[:, None], "differs"),  # the white one
        (lambda images, logits: logits * float("nan"), "by nan"),
        (lambda images, logits: logits[:1], r"shape \(1, 4\) for 2 images, not \(2, 4\)"),
    ],
)
def test_no_file_when_the_check_fails(change, message, wrong_result, tmp_path):
    wrong_result(change)
    for content in (None, "an older file"):
        if content is not None:
            (tmp_path / "model.onnx").write_text(content)
        before = [(file.name, file.read_text()) for file in tmp_path.iterdir()]
        with pytest.raises(ValueError, match=message):
            export_onnx(changed(), tmp_path / "model.onnx")
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == before


def test_no_part_of_a_file_when_writing_fails(wrong_result, tmp_path, monkeypatch):
    wrong_result(lambda images, logits: logits)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(changed(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_other_classes_are_never_tolerated(wrong_result, tmp_path):
    def swapped(images, logits):
        """The best class moves down and the second one up, each by less than what lies between them."""
        top = logits.topk(2).values
        change = 0.7 * (top[:, :1] - top[:, 1:])
        best, second = (logits == top[:, :1]), (logits == top[:, 1:])
        return logits - change * best + change * second

    wrong_result(swapped)
    with pytest.raises(ValueError, match="predicts other classes"):
        export_onnx(changed(), tmp_path / "model.onnx", tolerance=100)
    assert not list(tmp_path.iterdir())


def test_tolerance(wrong_result, tmp_path):
    wrong_result(lambda images, logits: logits + 1e-2)
    assert 1e-4 < export_onnx(changed(), tmp_path / "model.onnx", tolerance=0.1).max_difference <= 0.0101


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError) as error:
        export_onnx(changed(), tmp_path / "model.onnx")
    assert 'pip install "autolora-hf[onnx]"' in str(error.value) and name in str(error.value)


class Odd(nn.Module):
    """An identity that cannot be exported."""

    def __init__(self, problem):
        super().__init__()
        self.problem = problem

    def forward(self, x):
        if self.problem == "operator":
            return x + 0 * torch.linalg.eigvals(torch.eye(3)).real.sum()
        if self.problem == "value" and x.sum() > 1e6:
            return x + 1
        if self.problem == "count" and len(x) == 2:
            return x + torch.zeros(2, 1, 1, 1)
        return x


@pytest.mark.parametrize(
    ("problem", "message"),
    [("operator", "aten.linalg_eig"), ("value", "data-dependent"), ("count", "for any number of images")],
)
def test_what_cannot_be_exported(problem, message, tmp_path, capfd):
    network = timm.create_model("test_resnet", num_classes=3)
    network.maxpool = nn.Sequential(network.maxpool, Odd(problem))
    model = get_autolora_model(network, preprocessing=MODELS["timm_resnet"].preprocessing)
    with pytest.raises(ValueError) as error:
        export_onnx(model, tmp_path / "model.onnx")
    assert str(error.value).startswith("ResNet cannot be exported to ONNX") and message in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_folders_large_models_and_unknown_routes(tmp_path, monkeypatch):
    with pytest.raises(IsADirectoryError, match="is a folder: give the name of a file in it"):
        export_onnx(changed(), tmp_path)
    with pytest.raises(ValueError, match="robust"):
        export_onnx(changed(), tmp_path / "model.onnx", route="clean")
    monkeypatch.setattr(export_module, "_LARGEST", 1000)
    with pytest.raises(ValueError, match=r"ResNetForImageClassification take .* GiB .* less than 2 GiB"):
        export_onnx(changed(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# --- the command -----------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    model = changed(mode="full")
    model.save_pretrained(tmp_path / "model")
    command.run([str(tmp_path / "model"), str(tmp_path / "model.onnx"), "--route", "natural"])
    printed = capsys.readouterr().out
    assert "model.onnx" in printed and "8 images in onnxruntime" in printed
    with torch.no_grad():
        expected = model.pixel_space("natural")(pixels())
    assert relative(in_onnxruntime(tmp_path / "model.onnx", pixels()), expected) < 1e-5


def test_command_refuses_a_checkpoint_of_the_natural_route(capsys):
    with pytest.raises(SystemExit) as exit_:
        command.run(["model", "out", "--format", "checkpoint", "--route", "natural"])
    assert exit_.value.code == 2
    assert "--route natural is possible with --format onnx only" in capsys.readouterr().err
