"""The layers of each kind of branch, one by one: what they compute, where they start, how many values they have."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from test_layers import LAYERS as KINDS_OF_LAYER
from test_layers import inputs, output
from torch import nn

from autolora_hf.layers import (
    AdaKron,
    GatedFoura,
    LNLora,
    RankGate,
    WeightEfft,
    WeightFoura,
    branch_parameters,
    dct_matrix,
    patches_of,
    share_factors,
    takes_patches,
)


def made(kind, base, r=4, alpha=6, moved=True):
    layer = kind(base.double(), "one", LoraConfig(), r=r, lora_alpha=alpha).double().eval()
    if moved:
        move(layer)
    return layer


def move(layer):
    with torch.no_grad():
        for adapter in layer.r:
            for parameter in branch_parameters(layer, adapter).values():
                parameter += 0.3 * torch.randn_like(parameter)
                parameter.requires_grad_(True)


def patch_conv():
    return nn.Conv2d(3, 8, (4, 2), (4, 2))


OUTPUT_LAYERS = {
    "lnlora, linear": (LNLora, lambda: nn.Linear(6, 10), (3, 5, 6)),
    "lnlora, patches": (LNLora, patch_conv, (2, 3, 13, 8)),
    "lnlora, convolution": (LNLora, lambda: nn.Conv2d(3, 8, 3, padding=1, stride=2), (2, 3, 7, 7)),
    "adakron, linear": (AdaKron, lambda: nn.Linear(6, 10), (3, 5, 6)),
    "adakron, convolution": (AdaKron, lambda: nn.Conv2d(3, 8, 3, padding=1, stride=2), (2, 3, 7, 7)),
    "gated foura": (GatedFoura, lambda: nn.Linear(6, 10), (3, 5, 6)),
    "gated foura, windows": (GatedFoura, lambda: nn.Linear(6, 10), (3, 4, 4, 6)),
    "gated foura, one token": (GatedFoura, lambda: nn.Linear(6, 10), (3, 6)),
}


# ---- FouRA ----


@pytest.mark.parametrize("size", [1, 2, 7, 16, 600])
def test_the_cosine_transform_is_orthonormal(size):
    matrix = dct_matrix(size, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    # DCT-II: the first row is the mean, up to scale, and the k-th has k changes of sign.
    torch.testing.assert_close(matrix[0], torch.full((size,), size**-0.5, dtype=torch.float64))
    assert [(row.sign().diff() != 0).sum().item() for row in matrix] == list(range(size))


def test_foura_is_the_published_formula():
    layer, x = made(WeightFoura, nn.Linear(6, 10)), torch.randn(3, 5, 6, dtype=torch.float64)
    inner, outer = (dct_matrix(size, x) for size in (6, 10))
    low = (x @ inner.T) @ layer.lora_A["one"].T  # A F(x)
    expected = layer.base_layer(x) + (low @ layer.lora_B["one"].T * 6 / 4) @ outer  # F^-1 is the transpose
    torch.testing.assert_close(layer(x), expected)


def test_the_gated_foura_is_the_published_formula():
    layer, x = made(GatedFoura, nn.Linear(6, 10)), torch.randn(3, 5, 6, dtype=torch.float64)
    inner, outer = (dct_matrix(size, x) for size in (6, 10))
    low = (x @ inner.T) @ layer.lora_A["one"].T
    gate = layer.lora_gate["one"](low)
    expected = layer.base_layer(x) + (low * gate @ layer.lora_B["one"].T * 6 / 4) @ outer
    torch.testing.assert_close(layer(x), expected)
    # With every gate open it is the one that has none.
    open_layer = made(WeightFoura, copy.deepcopy(layer.base_layer))
    with torch.no_grad():
        layer.lora_gate["one"].offset.fill_(-100)
        for side in ("lora_A", "lora_B"):
            getattr(open_layer, side)["one"].copy_(getattr(layer, side)["one"])
    torch.testing.assert_close(layer(x), open_layer(x))


@pytest.mark.parametrize("name", KINDS_OF_LAYER)
@pytest.mark.parametrize("kind", [WeightFoura, WeightEfft])
def test_changes_of_a_weight(kind, name):
    """On every kind of layer: nothing at first, then what the changed weight computes, also merged."""
    layer, x = made(kind, KINDS_OF_LAYER[name](), moved=False), inputs(name)
    torch.testing.assert_close(output(layer, x), output(layer.base_layer, x))
    layer.update_layer("two", 2, lora_alpha=1, config=LoraConfig())
    layer.double()
    move(layer)
    layer._active_adapter = ["one", "two"]
    found, base = output(layer, x), copy.deepcopy(layer.base_layer)
    with torch.no_grad():
        for adapter in ("one", "two"):
            getattr(base, layer.parameter_name).add_(layer.get_delta_weight(adapter))
    torch.testing.assert_close(found, output(base, x))
    assert not torch.allclose(found, output(layer.base_layer, x), atol=1e-3)
    found.square().sum().backward()
    for adapter in ("one", "two"):
        assert all(p.grad.abs().max() > 0 for p in branch_parameters(layer, adapter).values())
    layer.merge(safe_merge=True)
    torch.testing.assert_close(output(layer.base_layer, x), found)
    layer.unmerge()
    torch.testing.assert_close(output(layer, x), found)


# ---- the rank gate ----


@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3), (4, 2, 3, 3)], ids=str)
def test_the_gate_is_zero_or_one_and_has_a_gradient(shape):
    gate = RankGate(3).double()
    values = 3 * torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        gate.second.weight.mul_(6)
    found = gate(values.requires_grad_())
    assert found.shape == (4, *[1] * (len(shape) - 2), 3)
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    found.sum().backward()
    gradients = [parameter.grad for parameter in gate.parameters()]
    # A single token has no distribution; slope and offset still learn.
    assert gate.slope.grad.abs() > 0 and gate.offset.grad.abs() > 0
    if len(shape) > 2:
        assert set(found.unique().tolist()) == {0.0, 1.0}
        assert values.grad.abs().max() > 0
        assert all(gradient.abs().max() > 0 for gradient in gradients if gradient is not gate.second.bias.grad)


def test_the_gate_starts_open_and_closes_where_one_token_stands_out():
    gate = RankGate(2)
    values = torch.randn(3, 16, 2)
    assert gate(values).eq(1).all()
    with torch.no_grad():
        gate.second.weight.zero_()
        gate.second.weight[0, 0] = 1
        gate.first.weight.copy_(torch.eye(2))
        gate.first.bias.zero_()
    values = torch.zeros(1, 16, 2)
    values[0, 5, 0] = 50
    assert gate(values).flatten().tolist() == [0, 1]


# ---- LNLoRA and AdaKron ----


def test_lnlora_is_the_published_formula():
    layer, x = made(LNLora, nn.Linear(6, 10)), torch.randn(3, 5, 6, dtype=torch.float64)
    norm = layer.lora_norm["one"]
    normalised = F.layer_norm(x, (6,)) * norm.weight + norm.bias
    expected = layer.base_layer(x) + normalised @ layer.lora_A["one"].T @ layer.lora_B["one"].T * 6 / 4
    torch.testing.assert_close(layer(x), expected)


def test_lnlora_of_patches_is_that_of_flattened_patches():
    """The convolution, and a linear layer with its weight and the same branch, agree."""
    layer, images = made(LNLora, patch_conv()), torch.randn(2, 3, 13, 8, dtype=torch.float64)
    conv = layer.base_layer
    linear = nn.Linear(24, 8)
    twin = made(LNLora, linear, moved=False)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        linear.bias.copy_(conv.bias)
        for name, parameter in branch_parameters(twin, "one").items():
            parameter.copy_(branch_parameters(layer, "one")[name])
    expected = twin(patches_of(images, conv.kernel_size)).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(images), expected)


@pytest.mark.parametrize("options", [{"padding": 1, "stride": 2}, {"dilation": 2}, {"padding": "same"}])
def test_lnlora_of_a_convolution_normalises_the_channels_at_each_place(options):
    layer, images = made(LNLora, nn.Conv2d(3, 8, 3, **options)), torch.randn(2, 3, 9, 7, dtype=torch.float64)
    norm, conv = layer.lora_norm["one"], layer.base_layer
    places = images.permute(0, 2, 3, 1)
    normalised = (F.layer_norm(places, (3,)) * norm.weight + norm.bias).permute(0, 3, 1, 2)
    change = (layer.lora_B["one"] @ layer.lora_A["one"]).view(8, 3, 3, 3) * 6 / 4
    expected = conv(images) + F.conv2d(normalised, change, None, conv.stride, conv.padding, conv.dilation)
    torch.testing.assert_close(layer(images), expected)
    assert sum(p.numel() for p in branch_parameters(layer, "one").values()) == 4 * (3 * 9 + 8) + 2 * 3


def test_which_convolutions_take_patches():
    assert takes_patches(patch_conv()) and takes_patches(nn.Conv2d(3, 5, 1))
    for changes in ({"stride": 2}, {"padding": 1}, {"groups": 2}, {"dilation": 2}):
        options = {"in_channels": 4, "out_channels": 4, "kernel_size": 4, "stride": 4, **changes}
        assert not takes_patches(nn.Conv2d(**options))
    assert not takes_patches(nn.Linear(3, 5))


def test_adakron_is_the_published_formula():
    layer, x = made(AdaKron, nn.Linear(6, 10), r=8), torch.randn(5, 6, dtype=torch.float64)
    first, second, up = layer.lora_down_1["one"], layer.lora_down_2["one"], layer.lora_up["one"]
    outputs = layer.base_layer(x)
    expected = torch.stack(
        [row + up(F.gelu(torch.kron(second(row), first(row)))) for row in outputs]  # u2 (x) u1 of one token
    )
    torch.testing.assert_close(layer(x), expected)


def test_adakron_on_a_convolution_is_that_of_each_place():
    layer = made(AdaKron, nn.Conv2d(3, 8, 3, padding=1))
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    before, after = layer.base_layer(images), layer(images)
    place = layer.change("one", None, before[:, :, 2:3, 3:4])
    torch.testing.assert_close(after[:, :, 2:3, 3:4], before[:, :, 2:3, 3:4] + place)


def test_adakron_needs_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        made(AdaKron, nn.Linear(6, 10), r=6)


@pytest.mark.parametrize("name", OUTPUT_LAYERS)
def test_changes_of_an_output(name):
    kind, base, shape = OUTPUT_LAYERS[name]
    layer = made(kind, base(), moved=False)
    x = torch.randn(shape, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.update_layer("two", 8, lora_alpha=1, config=LoraConfig())
    layer.double()
    move(layer)
    one = layer(x)
    layer._active_adapter = ["one", "two"]
    both = layer(x)
    torch.testing.assert_close(both, one + layer.change("two", x, one))
    both.square().sum().backward()
    for adapter in ("one", "two"):
        parameters = branch_parameters(layer, adapter)
        assert all(p.grad is not None for p in parameters.values())
        plain = {key: p for key, p in parameters.items() if "gate" not in key}
        assert all(p.grad.abs().max() > 0 for p in plain.values())
    with pytest.raises(ValueError, match="cannot be merged"):
        layer.merge()
    assert not layer.merged
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), both)
    layer._disable_adapters = True
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.weight is layer.base_layer.weight
    with pytest.raises(AttributeError, match="no_such_attribute"):
        _ = layer.no_such_attribute


@pytest.mark.parametrize("name", OUTPUT_LAYERS)
def test_half_precision(name):
    """Under autocast, and where the adapter has more precision than the layer, as PEFT makes it."""
    kind, base, shape = OUTPUT_LAYERS[name]
    layer = made(kind, base()).float()
    x = torch.randn(shape)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer(x)
    layer.base_layer.bfloat16()
    mixed = layer(x.bfloat16())
    assert mixed.dtype == torch.bfloat16
    if kind is not GatedFoura:  # whose gates may flip
        for found in (rough, mixed):
            torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


# ---- EFFT ----


def efft_layers(r=3):
    shapes = {"blocks.{}.q": (8, 8), "blocks.{}.v": (8, 8), "blocks.{}.fc1": (32, 8), "blocks.{}.fc2": (8, 32)}
    layers = {
        name.format(block): made(WeightEfft, nn.Linear(columns, rows), r=r, moved=False)
        for block in range(3)
        for name, (rows, columns) in shapes.items()
    }
    share_factors(layers, "one")
    return layers


def distinct(layers):
    found = {}
    for layer in layers.values():
        for name, parameter in branch_parameters(layer, "one").items():
            found.setdefault(name, set()).add(parameter)
    return found


def test_efft_shares_factors_by_shape_and_cores_by_name():
    layers = efft_layers()
    assert {name: len(parameters) for name, parameters in distinct(layers).items()} == {
        "lora_U": 2,  # 8 x 8 and the two MLP layers, which are each other's transposes
        "lora_V": 2,
        "lora_C": 4,
    }
    model = nn.ModuleDict({name.replace(".", "_"): layer for name, layer in layers.items()})
    for network in (model, copy.deepcopy(model)):
        count = sum(p.numel() for name, p in network.named_parameters() if "lora_" in name)
        assert count == 3 * (8 + 8) + 3 * (8 + 32) + 4 * 3 * 3
    move(layers["blocks.1.fc1"])
    fc1, fc2 = (layers[f"blocks.0.{name}"] for name in ("fc1", "fc2"))
    u, v = fc1.lora_U["one"], fc1.lora_V["one"]
    torch.testing.assert_close(fc1.get_delta_weight("one"), (u @ fc1.lora_C["one"] @ v).T * 2)
    torch.testing.assert_close(fc2.get_delta_weight("one"), u @ fc2.lora_C["one"] @ v * 2)


def test_efft_starts_at_zero_and_learns():
    layers = efft_layers()
    assert all(layer.get_delta_weight("one").abs().max() == 0 for layer in layers.values())
    x = torch.randn(4, 8, dtype=torch.float64)
    sum(layers[f"blocks.{block}.{name}"](x).square().sum() for block in range(3) for name in ("q", "v")).backward()
    assert layers["blocks.0.q"].lora_V["one"].grad.abs().max() > 0


# ---- counts, see the papers ----

VIT_B = {"q": (768, 768), "k": (768, 768), "v": (768, 768), "o": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}


def on_meta(kind, rows, columns, r):
    return kind(nn.Linear(columns, rows, device="meta"), "one", LoraConfig(), r=r, lora_alpha=1)


@pytest.mark.parametrize("r", [8, 16])
def test_parameters_of_lnlora_on_a_vit(r):
    count = 0
    for shapes, times in ((VIT_B.values(), 12), ([(768, 768)], 1)):  # the patch embedding is 768 x 3 16 16
        for rows, columns in shapes:
            layer = on_meta(LNLora, rows, columns, r)
            count += times * sum(p.numel() for p in branch_parameters(layer, "one").values())
    assert count == 167_424 * (r + 1)


@pytest.mark.parametrize(("r", "expected"), [(16, 87_552), (32, 178_176)])
def test_parameters_of_efft_on_a_vit(r, expected):
    layers = {f"blocks.{n}.{name}": on_meta(WeightEfft, *VIT_B[name], r) for n in range(12) for name in VIT_B}
    share_factors(layers, "one")
    count = sum(p.numel() for parameters in distinct(layers).values() for p in parameters)
    assert count == 5_376 * r + 6 * r**2 == expected


def test_parameters_of_adakron():
    layer = on_meta(AdaKron, 768, 3072, 48)
    assert sum(p.numel() for p in branch_parameters(layer, "one").values()) == 49_936


def test_parameters_of_foura():
    plain, gated = (branch_parameters(on_meta(kind, 10, 6, 4), "one") for kind in (WeightFoura, GatedFoura))
    assert sum(p.numel() for p in plain.values()) == 4 * (10 + 6)
    assert sum(p.numel() for p in gated.values()) == 4 * (10 + 6) + 2 * 4 * 5 + 2
