"""The frozen copy of a route: the same function, and up to date after `refresh`."""

import logging
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny_models import IMAGENET, MODELS, change_everything
from torch import nn

from autolora_hf import PGD, Preprocessing, ThreatModel, get_autolora_model
from autolora_hf import frozen as frozen_module
from autolora_hf.frozen import FrozenRoute
from autolora_hf.targets import statistics_norms


VARIANTS = [
    (name, mode, norm)
    for name, tiny in MODELS.items()
    for mode in ("full", "adapter")
    for norm in (("shared", "dual") if tiny.batch_norm else ("shared",))
]


@pytest.mark.parametrize(("name", "mode", "norm"), VARIANTS)
def test_same_logits_after_refresh(name, mode, norm):
    model = MODELS[name].adapted(mode=mode, norm=norm)
    pixels = torch.rand(4, 3, *model.preprocessing.image_size)
    for route in ("robust", "natural"):
        frozen = FrozenRoute(model, route)
        change_everything(model)
        with torch.no_grad():
            expected = model.pixel_space(route)(pixels)
            assert not torch.allclose(frozen(pixels), expected, atol=1e-4)
            torch.testing.assert_close(frozen.refresh()(pixels), expected, rtol=1e-4, atol=1e-5)
        assert model.current_route == "robust"
        assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_norms_of_a_resnet_are_folded():
    tiny = next(tiny for tiny in MODELS.values() if tiny.batch_norm)
    model = tiny.adapted()
    assert statistics_norms(model.get_base_model())
    assert not statistics_norms(FrozenRoute(model))


def test_norms_with_activations_are_folded():
    """`BatchNormAct2d` of timm, on the live model's activation, which may have weights of its own."""
    network = timm.create_model("test_efficientnet", num_classes=5)
    network.conv_stem = nn.Sequential(network.conv_stem, nn.Identity())
    network.bn1.act = nn.PReLU(network.bn1.num_features)
    model = get_autolora_model(network, preprocessing=IMAGENET)
    frozen = FrozenRoute(model)
    assert statistics_norms(model.get_base_model())
    assert not statistics_norms(frozen)
    change_everything(model)
    with torch.no_grad():
        model.get_base_model().bn1.act.weight.fill_(0.7)
        pixels = torch.rand(4, 3, 32, 32)
        expected = model.pixel_space()(pixels)
        torch.testing.assert_close(frozen.refresh()(pixels), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "kernel"), [((32, 32), (4, 4)), ((33, 39), (4, 8)), ((32, 32), (2, 2))])
def test_patches_are_a_matrix_product(size, kernel):
    conv = nn.Conv2d(3, 5, kernel, kernel).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64).requires_grad_()
    expected = conv(images)
    conv.__class__ = frozen_module._PatchLinear
    found = conv(images)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(output.square().sum(), images)[0] for output in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "replaced"),
    [
        ({}, True),
        ({"padding": "valid"}, True),
        ({"stride": 2}, False),
        ({"padding": 1}, False),
        ({"groups": 2}, False),
        ({"dilation": 2}, False),
        ({"kernel_size": 1, "stride": 1}, False),
    ],
    ids=str,
)
def test_only_patches_side_by_side(changes, replaced):
    conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "kernel_size": 4, "stride": 4, **changes})
    assert frozen_module._takes_patches(conv) is replaced


def test_a_patch_embedding_is_replaced():
    frozen = FrozenRoute(MODELS["timm_vit"].adapted())
    assert any(isinstance(module, frozen_module._PatchLinear) for module in frozen.modules())
    assert not any(type(module) is nn.Conv2d for module in frozen.modules())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("davit_tiny", {}), ("levit_128s", {}), ("lambda_resnet26t", {})],
    ids=["attributes of the patch embedding", "biases cached in eval mode", "weights of five dimensions"],
)
def test_models_of_their_own_kind(architecture, options):
    network = timm.create_model(architecture, num_classes=4, **options).eval()
    size = network.default_cfg["input_size"][1]
    preprocessing = Preprocessing((size, size), crop_pct=1.0)
    model = get_autolora_model(network, preprocessing=preprocessing)
    pixels = torch.rand(1, 3, size, size)
    # What an attack on the live model leaves behind.
    expected = model.eval().pixel_space()(pixels.requires_grad_())
    found = FrozenRoute(model)(pixels)
    scale = max(1, expected.abs().max().item())
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", MODELS)
def test_released_memory(name):
    model = MODELS[name].adapted()
    frozen, pixels = FrozenRoute(model), torch.rand(2, 3, *model.preprocessing.image_size)
    expected = frozen(pixels)
    frozen.release()
    tensors = [*frozen.network.parameters(), *frozen.network.buffers()]
    assert sum(tensor.untyped_storage().size() for tensor in tensors) == 0
    assert torch.equal(frozen.refresh()(pixels), expected)
    # The model itself shares none of it.
    assert torch.isfinite(model.pixel_space()(pixels)).all()


def test_nothing_is_folded_when_a_convolution_has_another_reader():
    """The output of `conv1` goes past the norm too, so that folding would change the logits."""
    tiny = next(tiny for tiny in MODELS.values() if tiny.batch_norm)
    backbone = timm.create_model("test_resnet", num_classes=5)
    backbone.bn1 = _Both(backbone.bn1)
    model = get_autolora_model(backbone, preprocessing=tiny.preprocessing)
    change_everything(model)
    frozen = FrozenRoute(model)
    pixels = torch.rand(2, 3, *model.preprocessing.image_size)
    with torch.no_grad():
        torch.testing.assert_close(frozen(pixels), model.pixel_space()(pixels), rtol=1e-4, atol=1e-5)
    assert statistics_norms(frozen)


class _Both(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x) + 0.5 * x


# ---- the fast attack against the plain one ----


def batch(model, size=8, seed=3):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    pixels = torch.rand(size, 3, *model.preprocessing.image_size, generator=generator, dtype=dtype)
    start = pixels + 8 / 255 * (2 * torch.rand(pixels.shape, generator=generator, dtype=dtype) - 1)
    return pixels, torch.randint(4, (size,), generator=generator), start.clamp(0, 1)


def plain_attack(model, pixels, labels, start, steps=10, eps=8 / 255, step_size=2 / 255):
    """What people write: the live network, two clamps, nothing folded; also the last gradient."""
    network, adversarial = model.pixel_space().eval(), start
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        loss = F.cross_entropy(network(adversarial), labels)
        (gradient,) = torch.autograd.grad(loss, adversarial)
        adversarial = adversarial.detach() + step_size * gradient.sign()
        adversarial = torch.min(torch.max(adversarial, pixels - eps), pixels + eps).clamp(0, 1)
    return adversarial, gradient


def loss_of(model, adversarial, labels):
    with torch.no_grad():
        return F.cross_entropy(model.pixel_space().eval()(adversarial), labels)


def gradient_of(function, pixels, labels):
    pixels = pixels.detach().clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(function(pixels), labels), pixels)[0]


@pytest.mark.parametrize(
    "switches", [{}, {"fold_norms": False}, {"linear_patches": False}, {"channels_last": False}], ids=str
)
@pytest.mark.parametrize(("name", "mode", "norm"), VARIANTS)
def test_the_fast_attack_is_the_plain_one(name, mode, norm, switches):
    model = MODELS[name].adapted(mode=mode, norm=norm)
    change_everything(model)
    model.double().eval()
    pixels, labels, start = batch(model)
    frozen = FrozenRoute(model, **switches)
    found = PGD(ThreatModel())(frozen, pixels, labels, start=start)
    expected, _ = plain_attack(model, pixels, labels, start)
    assert (found - expected).abs().max() <= 1e-12
    assert (expected - start).abs().max() > 1 / 255
    loss, plain_loss = loss_of(model, found, labels), loss_of(model, expected, labels)
    assert abs(loss - plain_loss) <= 1e-12 * max(1, plain_loss.item())
    one, other = gradient_of(frozen, found, labels), gradient_of(model.pixel_space(), found, labels)
    assert (one - other).norm() <= 1e-10 * other.norm()


@pytest.mark.parametrize("name", MODELS)
def test_in_float32_the_same_loss_is_reached(name):
    """Single pixels differ: gradients near zero change their sign with the rounding."""
    model = MODELS[name].adapted()
    change_everything(model)
    pixels, labels, start = batch(model, 32)
    found = PGD(ThreatModel())(FrozenRoute(model), pixels, labels, start=start)
    expected, _ = plain_attack(model, pixels, labels, start)
    assert (found != expected).float().mean() < 0.05
    torch.testing.assert_close(loss_of(model, found, labels), loss_of(model, expected, labels), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_reaches_the_same_loss(name):
    model = MODELS[name].adapted()
    change_everything(model)
    pixels, labels, start = batch(model, 64)
    frozen = FrozenRoute(model, dtype=torch.bfloat16)
    assert frozen.dtype == torch.bfloat16
    assert frozen(pixels).dtype == torch.float32
    one, other = gradient_of(frozen, start, labels), gradient_of(FrozenRoute(model), start, labels)
    assert F.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.98
    assert not torch.equal(one, other)
    losses = [
        loss_of(model, PGD(ThreatModel())(copy, pixels, labels, start=start), labels)
        for copy in (frozen, FrozenRoute(model))
    ]
    clean = loss_of(model, pixels, labels)
    assert losses[1] > 1.05 * clean
    assert losses[0] - clean > 0.98 * (losses[1] - clean)
    change_everything(model, seed=5)
    torch.testing.assert_close(frozen.refresh()(pixels), FrozenRoute(model)(pixels), rtol=0.1, atol=0.2)


@pytest.mark.parametrize("name", MODELS)
def test_autocast_does_not_reach_the_attack(name):
    model = MODELS[name].adapted()
    pixels, _, _ = batch(model)
    frozen = FrozenRoute(model)
    expected = frozen(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(pixels), expected)
        assert not torch.equal(model.pixel_space()(pixels).float(), expected)


# ---- torch.compile ----


def test_only_batches_of_one_size_are_compiled(monkeypatch):
    compiled = []

    def fake(function, **options):
        assert options == {"dynamic": False, "mode": None}
        return lambda images: compiled.append(len(images)) or function(images)

    monkeypatch.setattr(torch, "compile", fake)
    model = MODELS["timm_resnet"].adapted()
    frozen, pixels = FrozenRoute(model, compiled_batch=8), batch(model)[0]
    expected = FrozenRoute(model)(pixels)
    assert torch.equal(frozen(pixels[:3]), expected[:3]) or torch.allclose(frozen(pixels[:3]), expected[:3], atol=1e-5)
    assert compiled == []
    assert torch.equal(frozen(pixels), expected)
    assert compiled == [8, 8]  # once to compare
    frozen(pixels)
    assert compiled == [8, 8, 8]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda run: lambda images: run(images) * 1.01, "its logits differ by 0.01"),
        (lambda run: lambda images: run(images).detach() + 0 * images.flatten(1)[:, :1], "its gradients differ"),
        (lambda run: lambda images: run(images) * float("nan"), "differ by nan"),
        (lambda run: lambda images: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["logits", "gradients", "nan", "error"],
)
def test_a_compiler_that_fails_is_not_used(monkeypatch, caplog, broken, reason):
    monkeypatch.setattr(torch, "compile", lambda function, **_: broken(function))
    model = MODELS["timm_resnet"].adapted()
    frozen, pixels = FrozenRoute(model, compiled_batch=8), batch(model)[0]
    with caplog.at_level(logging.WARNING, frozen_module.__name__):
        assert torch.equal(frozen(pixels), FrozenRoute(model)(pixels))
        frozen(pixels)
    (record,) = caplog.records
    assert "run without torch.compile" in record.getMessage() and reason in record.getMessage()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
def test_compiled_attack(name, dtype, caplog):
    model = MODELS[name].adapted()
    change_everything(model)
    pixels, labels, start = batch(model, 32)
    frozen = FrozenRoute(model, compiled_batch=32, dtype=dtype)
    found = PGD(ThreatModel())(frozen, pixels, labels, start=start)
    assert frozen._compiled != frozen._run
    assert not [record for record in caplog.records if record.name == frozen_module.__name__]
    expected = PGD(ThreatModel())(FrozenRoute(model), pixels, labels, start=start)
    tolerance = 1e-4 if dtype is None else 5e-3
    torch.testing.assert_close(loss_of(model, found, labels), loss_of(model, expected, labels), rtol=tolerance, atol=0)
    change_everything(model, seed=5)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype is None else {"rtol": 0.1, "atol": 0.2}
    torch.testing.assert_close(frozen.refresh()(pixels), FrozenRoute(model)(pixels), **close)
