"""The frozen copy of a route: the same function, and up to date after `refresh`."""

import pytest
import timm
import torch
from tiny_models import MODELS, change_everything
from torch import nn

from autolora_hf import get_autolora_model
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
