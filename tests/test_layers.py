"""`WeightLora`: the low-rank change of the weight, on every kind of layer."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from timm.layers.std_conv import ScaledStdConv2dSame, StdConv2dSame
from torch import nn

from autolora_hf.layers import WeightLora, fold_factors, unfold_factors


class OtherLinear(nn.Linear):
    """A linear layer that does something else with its weight."""

    def forward(self, x):
        return F.linear(x, 2 * self.weight.tanh(), self.bias)


# The kinds for which the released layout is compared with PEFT's.
PLAIN = {
    "3x3": lambda: nn.Conv2d(5, 7, 3, padding=1, bias=False),
    "3x3, stride 2": lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1),
    "1x1, stride 2": lambda: nn.Conv2d(5, 7, 1, stride=2, bias=False),
    "5x5": lambda: nn.Conv2d(5, 7, 5),
    "linear": lambda: nn.Linear(5, 7),
    "linear without bias": lambda: nn.Linear(5, 7, bias=False),
}
LAYERS = PLAIN | {
    "grouped": lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3),
    "depthwise": lambda: nn.Conv2d(5, 5, 7, padding=3, groups=5),
    "depthwise 1x1": lambda: nn.Conv2d(5, 5, 1, groups=5),
    "dilated": lambda: nn.Conv2d(5, 7, 3, padding=2, dilation=2),
    "reflected": lambda: nn.Conv2d(5, 7, 3, padding=1, padding_mode="reflect"),
    "1x7": lambda: nn.Conv2d(5, 7, (1, 7), padding=(0, 3)),
    "7x3": lambda: nn.Conv2d(5, 7, (7, 3), padding=(3, 1)),
    "same": lambda: Conv2dSame(5, 7, 3, stride=2),
    "standardised": lambda: StdConv2d(5, 7, 3, padding=1),
    "standardised, same": lambda: StdConv2dSame(5, 7, 3, stride=2),
    "scaled and standardised": lambda: ScaledStdConv2d(5, 7, 3, padding=1),
    "scaled, standardised, same": lambda: ScaledStdConv2dSame(5, 7, 3, stride=2),
    "standardised, grouped": lambda: ScaledStdConv2d(6, 9, 3, padding=1, groups=3),
    "one dimension": lambda: nn.Conv1d(5, 7, 3, padding=1),
    "three dimensions": lambda: nn.Conv3d(5, 7, 3, padding=1),
    "other linear": lambda: OtherLinear(5, 7),
    "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
}
LAYOUTS = ("released", "peft")


def branch(name, layout="released", r=2, alpha=3, dtype=torch.float64):
    layer = WeightLora(LAYERS[name]().to(dtype), "one", LoraConfig(), r=r, lora_alpha=alpha, layout=layout)
    nn.init.normal_(layer.lora_B["one"], std=0.1)
    return layer


def inputs(name, dtype=torch.float64):
    base = LAYERS[name]()
    shape = {nn.Conv1d: (9,), nn.Conv3d: (4, 4, 4)}.get(type(base), (9, 9))
    if isinstance(base, nn.MultiheadAttention):
        return (torch.randn(4, 3, 6, dtype=dtype),) * 3
    if isinstance(base, nn.Linear):
        return (torch.randn(4, 5, dtype=dtype),)
    return (torch.randn(4, base.in_channels, *shape, dtype=dtype),)


def output(layer, x):
    result = layer(*x)
    return result[0] if isinstance(result, tuple) else result


def changed_copy(layer):
    """The base layer on its own, with the changed weight written into it."""
    base = copy.deepcopy(layer.get_base_layer())
    weight = getattr(base, layer.parameter_name)
    with torch.no_grad():
        for name in layer.active_adapters:
            delta = layer.lora_B[name] @ layer.lora_A[name] * layer.lora_alpha[name] / layer.r[name]
            weight += delta.reshape(weight.shape)
    return base


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_branch_is_a_change_of_the_weight(name, layout):
    layer, x = branch(name, layout), inputs(name)
    base = layer.get_base_layer()
    expected = output(changed_copy(layer), x)
    assert not torch.allclose(expected, output(base, x), atol=1e-3)
    torch.testing.assert_close(output(layer, x), expected)
    # A model that reads the weight instead of calling the layer gets the same one.
    weight = getattr(layer, layer.parameter_name)
    torch.testing.assert_close(weight, getattr(changed_copy(layer), layer.parameter_name))
    output(layer, x).square().sum().backward()
    assert all(layer.lora_A["one"].grad.abs().amax(1) > 0)
    assert all(layer.lora_B["one"].grad.abs().amax(0) > 0)
    layer._disable_adapters = True
    assert torch.equal(output(layer, x), output(base, x))
    assert getattr(layer, layer.parameter_name) is getattr(base, layer.parameter_name)


@pytest.mark.parametrize("name", PLAIN)
def test_released_shapes(name):
    layer = branch(name)
    base = layer.get_base_layer()
    width = base.kernel_size[0] if isinstance(base, nn.Conv2d) else 1
    assert layer.lora_A["one"].shape == (2 * width, 5 * width)
    assert layer.lora_B["one"].shape == (7 * width, 2 * width)


@pytest.mark.parametrize(
    ("name", "layout", "first", "second"),
    [
        ("grouped", "released", (6, 6), (27, 6)),  # 3 x 3 of 2 channels a group: rank r k = 16 is cut to 6
        ("grouped", "peft", (8, 18), (9, 8)),
        ("depthwise", "released", (7, 7), (35, 7)),
        ("depthwise", "peft", (5, 49), (5, 5)),
        ("depthwise 1x1", "released", (1, 1), (5, 1)),
        ("1x7", "released", (8, 35), (7, 8)),
        ("7x3", "released", (24, 15), (49, 24)),
        ("7x3", "peft", (8, 105), (7, 8)),
        ("one dimension", "released", (8, 5), (21, 8)),
        ("three dimensions", "released", (24, 45), (21, 24)),
        ("attention", "released", (8, 6), (18, 8)),
    ],
)
def test_shapes_of_other_kernels(name, layout, first, second):
    layer = branch(name, layout, r=8)
    assert layer.lora_A["one"].shape == first
    assert layer.lora_B["one"].shape == second


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_branch_starts_at_zero(name, layout):
    layer = WeightLora(LAYERS[name](), "one", LoraConfig(), r=64, lora_alpha=1, layout=layout)
    assert not layer.lora_B["one"].any()
    assert layer.lora_A["one"].any()
    assert layer.get_delta_weight("one").abs().max() == 0
    if layout == "released" and name in PLAIN:
        assert layer.lora_A["one"].std().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("name", [name for name in PLAIN if "linear" not in name])
def test_pefts_layout_starts_as_peft_does(name):
    """The same spread of the first factor, and the options of `init_lora_weights`."""
    base = LAYERS[name]()
    stock = get_peft_model(nn.Sequential(copy.deepcopy(base)), LoraConfig(r=64, target_modules=["0"]))
    wanted = stock.base_model.model[0].lora_A["default"].weight.std().item()
    layer = WeightLora(base, "one", LoraConfig(), r=64, lora_alpha=1, layout="peft")
    assert layer.lora_A["one"].std().item() == pytest.approx(wanted, rel=0.2)
    layer.update_layer("two", 64, lora_alpha=1, config=LoraConfig(init_lora_weights="gaussian"))
    assert layer.lora_A["two"].std().item() == pytest.approx(1 / 64, rel=0.2)
    layer.update_layer("three", 64, lora_alpha=1, config=LoraConfig(init_lora_weights=False))
    assert layer.lora_B["three"].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_branches_add_up_and_merge(name, layout):
    layer = branch(name, layout)
    layer.update_layer("two", 4, lora_alpha=1, config=LoraConfig())
    nn.init.normal_(layer.lora_B["two"])
    layer._active_adapter = ["one", "two"]
    base, key = layer.get_base_layer(), layer.parameter_name
    x, weight = inputs(name), getattr(base, key).clone()
    both = output(layer, x)
    torch.testing.assert_close(both, output(changed_copy(layer), x))
    layer.merge(safe_merge=True)
    assert layer.merged_adapters == ["one", "two"]
    torch.testing.assert_close(output(base, x), both)
    torch.testing.assert_close(output(layer, x), both)
    layer.unmerge()
    assert not layer.merged
    torch.testing.assert_close(getattr(base, key), weight)
    torch.testing.assert_close(output(layer, x), both)
    layer.merge(adapter_names=["two"])
    torch.testing.assert_close(getattr(base, key), weight + layer.get_delta_weight("two"))
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_merging_refuses_nan():
    layer = branch("3x3")
    weight = layer.get_base_layer().weight.clone()
    layer.lora_A["one"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, weight)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name):
    layer, x = branch(name, dtype=torch.float32), inputs(name, torch.float32)
    exact = output(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = output(layer, x)
    rough.float().sum().backward()
    assert layer.lora_A["one"].grad.isfinite().all()
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


@pytest.mark.parametrize("name", LAYERS)
def test_the_wrapper_shows_the_layers_attributes(name):
    layer = branch(name)
    for copied in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)) if name == "3x3" else layer):
        base = copied.get_base_layer()
        for attribute in ("kernel_size", "stride", "batch_first", "out_features", "bias"):
            if hasattr(base, attribute):
                assert getattr(copied, attribute) is getattr(base, attribute) or attribute == "out_features"
        with pytest.raises(AttributeError, match="no_such_attribute"):
            _ = copied.no_such_attribute


# ---- the released layout in PEFT's ----


@pytest.mark.parametrize("r", [1, 2, 8])
@pytest.mark.parametrize("width", [1, 3, 5])
def test_folding_undoes_unfolding_to_the_bit(width, r):
    lora_a, lora_b = torch.randn(r * width, 6 * width), torch.randn(7 * width, r * width)
    first, second = unfold_factors(lora_a, lora_b, width)
    assert first.shape == (r * width**2, 6, width, width)
    assert second.shape == (7, r * width**2, 1, 1)
    again = fold_factors(first, second, width)
    assert torch.equal(again[0], lora_a)
    assert torch.equal(again[1], lora_b)


@pytest.mark.parametrize("r", [1, 2, 8])
@pytest.mark.parametrize("name", [name for name in PLAIN if "linear" not in name])
def test_unfolded_factors_change_the_weight_alike_in_peft(name, r):
    layer = branch(name, r=r, dtype=torch.float32)
    first, second = unfold_factors(layer.lora_A["one"], layer.lora_B["one"], layer.kernel_width)
    rank = len(first)
    stock = get_peft_model(
        nn.Sequential(layer.get_base_layer()),
        LoraConfig(r=rank, lora_alpha=layer.scaling["one"] * rank, target_modules=["0"]),
    )
    theirs = stock.base_model.model[0]
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(first)
        theirs.lora_B["default"].weight.copy_(second)
    torch.testing.assert_close(theirs.get_delta_weight("default"), layer.get_delta_weight("one"), rtol=1e-6, atol=1e-6)
    x = inputs(name, torch.float32)
    torch.testing.assert_close(stock(*x), layer(*x), rtol=1e-5, atol=1e-5)
