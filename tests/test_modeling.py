"""What `get_autolora_model` makes, what it refuses, and the released layout of a branch."""

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from tiny_models import IMAGE_SIZE, LAYOUTS, MODELS, MODES, VARIANTS, change_everything, pixels
from torch import nn

from autolora_hf import (
    AutoLoraConfig,
    AutoLoraModel,
    Preprocessing,
    ThreatModel,
    get_autolora_model,
    load_autolora_model,
)
from autolora_hf.frozen import FrozenRoute
from autolora_hf.objectives import AutoLora, Batch
from autolora_hf.schedules import LossScalars


def logits_of(output):
    return output if isinstance(output, torch.Tensor) else output.logits


# ---- both routes ----


@pytest.mark.parametrize(("name", "mode", "layout", "norm"), VARIANTS)
def test_routes_start_at_the_backbone_and_part_in_training(name, mode, layout, norm):
    tiny = MODELS[name]
    model = tiny.adapted(mode=mode, layout=layout, norm=norm)
    images = pixels()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (tiny.preprocessing.mean, tiny.preprocessing.std))
    with torch.no_grad():
        expected = logits_of(tiny.fresh()((images - mean) / std))
        for route in ("robust", "natural"):
            torch.testing.assert_close(model.pixel_space(route)(images), expected, rtol=1e-5, atol=1e-5)

    # In double precision, since the branch of some layouts moves little in one step.
    model.double().train()
    images = images.double()
    routes = {route: model.pixel_space(route) for route in ("robust", "natural")}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    batch = Batch(images, (images + 0.03).clamp(max=1), torch.tensor([0, 1, 2, 3]))
    AutoLora()(lambda route, x: routes[route](x), batch, LossScalars(0.5, 3.0)).loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        robust, natural = routes["robust"](images), routes["natural"](images)
    for one, other in ((robust, expected), (natural, expected), (robust, natural)):
        assert (one - other).abs().max() > 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_returns_what_the_base_returns(name, mode):
    model = MODELS[name].adapted(mode=mode)
    change_everything(model)
    preprocessing, images = model.preprocessing, pixels()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    normalised = (images - mean) / std
    outputs = {}
    for route in ("robust", "natural"):
        with model.route(route):
            output = model(normalised)
        assert type(output) is type(MODELS[name].fresh()(normalised))
        assert torch.equal(logits_of(output), model.pixel_space(route)(images))
        outputs[route] = logits_of(output)
    assert not torch.allclose(outputs["robust"], outputs["natural"])
    # Outside any route the deployed one runs.
    assert torch.equal(logits_of(model(normalised)), outputs["robust"])
    assert isinstance(model, peft.PeftModel)
    if name.startswith("hf"):
        labels = torch.tensor([0, 1, 2, 3])
        loss = model(pixel_values=normalised, labels=labels).loss
        torch.testing.assert_close(loss, F.cross_entropy(outputs["robust"], labels))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_without_adapters_it_is_the_base(name, mode):
    model = MODELS[name].adapted(mode=mode)
    change_everything(model)
    images = pixels()
    normalised = model.pixel_space().normalize(images)
    before = {route: model.pixel_space(route)(images) for route in ("robust", "natural")}
    with model.disable_adapter():
        bare = logits_of(model(normalised))
    if mode == "full":
        assert torch.equal(bare, before["robust"])
    else:
        assert torch.equal(bare, logits_of(MODELS[name].fresh()(normalised)))
    for route, logits in before.items():
        assert torch.equal(model.pixel_space(route)(images), logits)


@pytest.mark.parametrize("route", ["robust", "natural"])
@pytest.mark.parametrize(("name", "mode", "layout", "norm"), [v for v in VARIANTS if v[-1] != "robust_stats"])
def test_a_frozen_route_is_the_same_function(name, mode, layout, norm, route):
    model = MODELS[name].adapted(mode=mode, layout=layout, norm=norm)
    change_everything(model)
    images = pixels().requires_grad_(True)

    def value_and_gradient(view):
        logits = view(images)
        return logits.detach(), torch.autograd.grad(logits.square().sum(), images)[0]

    expected = value_and_gradient(model.pixel_space(route))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    frozen = FrozenRoute(model.train(), route)
    assert not any(isinstance(module, (LoraLayer, nn.BatchNorm2d)) for module in frozen.modules())
    found = value_and_gradient(frozen)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(module.training for module in model.modules())
    # It is a copy.
    change_everything(model, seed=5)
    assert all(torch.equal(*pair) for pair in zip(value_and_gradient(frozen), found, strict=True))


def test_set_adapter_is_refused():
    model = MODELS["hf_vit"].adapted()
    with pytest.raises(RuntimeError, match=r"set_adapter\('natural'\).*model.route\('natural'\)"):
        model.set_adapter("natural")


# ---- which layers ----

# Parameters of the branch: a published property of the method's code, by rank.
BRANCH_SIZES = {
    "resnet18": {2: 132_864, 4: 265_728, 8: 531_456, 16: 1_062_912},
    "resnet50": {2: 218_880, 4: 437_760, 8: 875_520, 16: 1_751_040},
}


@pytest.mark.parametrize(("name", "r"), [(name, r) for name, sizes in BRANCH_SIZES.items() for r in sizes])
def test_size_of_the_branch(name, r):
    network = timm.create_model(name, num_classes=10)
    convolutions = {key for key, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    sizes = {key: parameter.numel() for key, parameter in network.named_parameters()}
    model = get_autolora_model(network, AutoLoraConfig(r=r), preprocessing=Preprocessing((64, 64)))
    trainable = {key: p.numel() for key, p in model.named_parameters() if p.requires_grad}
    branch = {key: size for key, size in trainable.items() if ".lora_" in key}
    assert sum(branch.values()) == BRANCH_SIZES[name][r]
    assert sum(trainable.values()) - sum(branch.values()) == sum(sizes.values())
    # Every convolution of the blocks, down-sampling included; neither stem nor head.
    assert model.lora_layers().keys() == convolutions - {"conv1"}
    assert {layer.scaling["natural"] for layer in model.lora_layers().values()} == {1 / r}


@pytest.mark.parametrize("name", MODELS)
def test_head_and_targets_are_found(name):
    model = MODELS[name].adapted()
    base = MODELS[name].fresh()
    assert model.autolora_config.head == MODELS[name].head
    assert model.heads[0].out_features == model.num_classes == 4
    layers = {key for key, module in base.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    stems = {
        "timm_resnet": {"conv1.0", "conv1.3", "conv1.6"},
        "timm_vit": {"patch_embed.proj"},
        "hf_resnet": {"resnet.embedder.embedder.convolution"},
        "hf_vit": {"vit.embeddings.patch_embeddings.projection"},
    }
    assert model.lora_layers().keys() == layers - {MODELS[name].head} - stems[name]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_what_trains(name, mode):
    model = MODELS[name].adapted(mode=mode)
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {key for key, _ in model.named_parameters() if ".lora_A." in key or ".lora_B." in key}
    assert factors <= trainable
    others = trainable - factors
    if mode == "full":
        assert len(others) == len(list(MODELS[name].fresh().parameters()))
    else:
        assert all(".modules_to_save.robust." in key for key in others)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in MODELS[name].fresh().modules())
        assert len(others) == 2 * norms + 2  # weight and bias of each norm and of the head


def test_target_modules_can_be_chosen():
    tiny = MODELS["hf_vit"]
    for wanted in (["q_proj", "v_proj"], r".*\.(q|v)_proj"):
        model = tiny.adapted(target_modules=wanted)
        assert model.lora_layers().keys() == {f"vit.layers.{i}.attention.{p}_proj" for i in (0, 1) for p in "qv"}
    model = MODELS["timm_vit"].adapted(target_modules="all-linear")
    linears = {key for key, module in MODELS["timm_vit"].fresh().named_modules() if isinstance(module, nn.Linear)}
    assert model.lora_layers().keys() == linears - {"head"}


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x, **kwargs):
        return self.inner(x, x, x, need_weights=False)[0]


def unlike_blocks():
    """A ViT with an `nn.MultiheadAttention`, and a layer that two blocks share."""
    network = MODELS["timm_vit"].fresh()
    torch.manual_seed(1)
    network.blocks[0].attn = _Attention()
    network.blocks[1].mlp.fc1 = network.blocks[0].mlp.fc1
    return network.eval()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_attention_as_one_module_and_shared_layers(tmp_path, mode, layout):
    config = AutoLoraConfig(mode=mode, layout=layout, target_modules="all")
    model = get_autolora_model(unlike_blocks(), config)
    names = model.lora_layers().keys()
    assert "blocks.0.attn.inner" in names
    # PEFT would give it a branch in one of its two places.
    assert not {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"} & names
    with pytest.raises(ValueError, match=r"several places of the model: blocks\.0\.mlp\.fc1"):
        get_autolora_model(unlike_blocks(), AutoLoraConfig(mode=mode, target_modules=["blocks.0.mlp.fc1"]))
    change_everything(model)
    with torch.no_grad():
        outputs = {route: model.pixel_space(route)(pixels()) for route in ("robust", "natural")}
        for route, expected in outputs.items():
            torch.testing.assert_close(FrozenRoute(model, route)(pixels()), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(outputs["robust"], outputs["natural"], atol=1e-3)
        model.save_pretrained(tmp_path)
        loaded = load_autolora_model(tmp_path, base_model=unlike_blocks())
        assert torch.equal(loaded.pixel_space()(pixels()), outputs["robust"])
        images = model.pixel_space().normalize(pixels())
        torch.testing.assert_close(model.merge_and_unload()(images), outputs["robust"], rtol=1e-4, atol=1e-4)


def test_tied_weights_get_no_branch():
    network = MODELS["timm_vit"].fresh()
    network.blocks[1].mlp.fc1.weight = network.blocks[0].mlp.fc1.weight
    model = get_autolora_model(network, AutoLoraConfig(mode="adapter", target_modules="all"))
    assert not {name for name in model.lora_layers() if name.endswith("fc1")}
    change_everything(model)
    with torch.no_grad():
        expected = model.pixel_space()(pixels())
        torch.testing.assert_close(FrozenRoute(model)(pixels()), expected, rtol=1e-4, atol=1e-4)
        images = model.pixel_space().normalize(pixels())
        torch.testing.assert_close(model.merge_and_unload()(images), expected, rtol=1e-4, atol=1e-4)


def hooked(kind):
    network = MODELS["timm_vit"].fresh()
    layer = network.blocks[1].mlp.fc1
    if kind == "forward hook":
        layer.register_forward_hook(lambda module, inputs, output: output * 2)
    elif kind == "forward pre-hook":
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    else:
        forward = layer.forward
        layer.forward = lambda x: forward(x) * 2
    return network


@pytest.mark.parametrize("kind", ["forward hook", "forward pre-hook", "forward of the instance"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_layers_with_hooks_keep_them(mode, layout, kind):
    network = hooked(kind)
    images = MODELS["timm_vit"].adapted().pixel_space().normalize(pixels())
    with torch.no_grad():
        expected = network(images)
        model = get_autolora_model(network, AutoLoraConfig(mode=mode, layout=layout)).eval()
        for route in ("robust", "natural"):
            with model.route(route):
                torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_hidden_layers_of_the_classifier_can_train_too(tmp_path, caplog, mode):
    def network():
        model = MODELS["timm_resnet"].fresh()
        torch.manual_seed(1)
        model.fc = nn.Sequential(nn.Linear(model.num_features, 8), nn.ReLU(), nn.Linear(8, 4))
        return model.eval()

    preprocessing = MODELS["timm_resnet"].preprocessing
    model = get_autolora_model(network(), AutoLoraConfig(mode=mode), preprocessing=preprocessing)
    assert model.autolora_config.head == "fc.2"
    assert ("fc.0 stays frozen in mode 'adapter'" in caplog.text) == (mode == "adapter")
    config = AutoLoraConfig(mode=mode, head=["fc.0", "fc.2"])
    model = get_autolora_model(network(), config, preprocessing=preprocessing)
    with model.route("natural"):
        trains = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert len([name for name in trains if ".fc." in name]) == 4
    change_everything(model)
    model.save_pretrained(tmp_path)
    loaded = load_autolora_model(tmp_path, base_model=network())
    assert torch.equal(loaded.pixel_space()(pixels()), model.pixel_space()(pixels()))


def test_a_frozen_model_cannot_be_trained_in_full():
    network = MODELS["timm_resnet"].fresh().requires_grad_(False)
    with pytest.raises(ValueError, match=r"Every parameter of the model is frozen.*mode='adapter'"):
        get_autolora_model(network, preprocessing=MODELS["timm_resnet"].preprocessing)
    get_autolora_model(network, AutoLoraConfig(mode="adapter"), preprocessing=MODELS["timm_resnet"].preprocessing)


class _Doubling(nn.Linear):
    """Does more to a weight that is not its own parameter: no branch can be exact."""

    def forward(self, x):
        scale = 1.0 if isinstance(self.weight, nn.Parameter) else 2.0
        return F.linear(x, scale * self.weight, self.bias)


def test_routes_that_are_not_the_model_are_refused():
    network = MODELS["timm_vit"].fresh()
    odd = _Doubling(64, network.blocks[0].mlp.fc1.out_features)
    network.blocks[0].mlp.fc1 = odd
    refusal(network, "cannot have two exact routes", "natural route", "target_modules")


@pytest.mark.parametrize("name", MODELS)
def test_the_head_can_be_named(name):
    assert MODELS[name].adapted(head=MODELS[name].head).autolora_config.head == MODELS[name].head


# ---- refusals ----


def snapshot(model):
    """All of a model that its owner could notice a change of."""
    return (
        {name: id(module) for name, module in model.named_modules()},
        {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        set(vars(model)),
    )


def assert_unchanged(model, before):
    modules, tensors, *rest = snapshot(model)
    assert modules == before[0]
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert tensors.keys() == before[1].keys()
    for name, (identity, value) in tensors.items():
        assert identity == before[1][name][0]
        assert torch.equal(value, before[1][name][1])
    assert rest == list(before[2:])


def refusal(network, *parts, error=ValueError, preprocessing=None, **config):
    before = snapshot(network)
    with pytest.raises(error) as caught:
        get_autolora_model(network, AutoLoraConfig(**config), preprocessing=preprocessing)
    for part in parts:
        assert part in str(caught.value)
    assert_unchanged(network, before)


class _Detached(nn.Module):
    def forward(self, x):
        return x.detach()


@pytest.mark.parametrize("mode", MODES)
def test_dead_branches_are_refused(mode):
    network = MODELS["timm_vit"].fresh()
    network.blocks[0].mlp.drop2 = _Detached()
    network.patch_embed.requires_grad_(False)
    network.train().blocks[0].eval()
    dead = "weights of blocks.0.mlp.fc1, blocks.0.mlp.fc2, so their branches would be dead"
    refusal(network, dead, "target_modules", mode=mode)
    # With the advice of the message it works, on the same model.
    model = get_autolora_model(network, AutoLoraConfig(mode=mode, target_modules=["proj", "qkv"]))
    assert {name.rpartition(".")[2] for name in model.lora_layers()} == {"proj", "qkv"}


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"head": "clasifier"}, ["`head='clasifier'`", "not a layer of ViTForImageClassification"]),
        ({"head": "vit"}, ["`head='vit'`", "a ViTModel", "come from classifier"]),
        ({"head": []}, ["must name each classification layer once"]),
        ({"head": ["classifier", "classifier"]}, ["must name each classification layer once"]),
        ({"target_modules": []}, ["`target_modules` is empty"]),
        ({"target_modules": "("}, ["`target_modules='('` is not a regular expression"]),
        ({"head": ["classifier", "vit"]}, ["`head=['classifier', 'vit']`", "a ViTModel"]),
        ({"target_modules": ["layernorm_before"]}, ["cannot carry a branch", "layernorm_before (LayerNorm)"]),
        ({"target_modules": ["q", "fc9", "fc1"]}, ["does not have: fc9, q.", "vit.layers.0.attention.q_proj"]),
        ({"target_modules": ["classifier"]}, ["includes the head 'classifier'"]),
        ({"target_modules": r".*(classifier|fc1)"}, ["includes the head 'classifier'"]),
        ({"target_modules": "nothing.*"}, ["`target_modules='nothing.*'` matches no layer"]),
        ({"norm": "dual"}, ["`norm='dual'`", "BatchNorm", "`norm='shared'`"]),
        ({"norm": "robust_stats"}, ["`norm='robust_stats'`", "this model has none"]),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_wrong_choices_are_refused(mode, config, parts):
    refusal(MODELS["hf_vit"].fresh(), *parts, preprocessing=MODELS["hf_vit"].preprocessing, mode=mode, **config)


def test_layers_whose_names_end_alike_are_told_apart(tmp_path):
    """PEFT matches the ends of names, so it would take `aux_head` along with `head`."""
    network = MODELS["timm_vit"].fresh()
    network.aux_head = nn.Linear(64, 4)
    model = get_autolora_model(network, AutoLoraConfig(mode="adapter"))
    assert not any(parameter.requires_grad for parameter in model.get_base_model().aux_head.parameters())
    assert {name for name, _ in model._saved_modules().items()} == {"head"}
    model.save_pretrained(tmp_path)
    # Stock PEFT could not load it without a warning, so it is not offered to it.
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_model_without_a_head_is_refused():
    refusal(
        timm.create_model("test_vit", num_classes=0, img_size=32),
        "has no classifier (0 classes)",
        "num_classes",
    )


def test_what_is_no_image_classifier_is_refused():
    refusal(nn.Sequential(nn.Linear(3, 4)), "got Sequential", "timm model", error=TypeError)
    with pytest.raises(TypeError, match="got int"):
        get_autolora_model(7)


def test_an_adapted_model_is_refused():
    model = MODELS["timm_resnet"].adapted()
    for again in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="already carries adapters"):
            get_autolora_model(again)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("resnet51", ["'resnet51'", "Did you mean", "'resnet50'"]), ("@@", ["'@@'", "not a timm model"])],
)
def test_unknown_names_are_refused(name, parts):
    with pytest.raises(ValueError) as caught:
        get_autolora_model(name)
    assert all(part in str(caught.value) for part in parts)
    assert ("Did you mean" in str(caught.value)) == (len(parts) == 3)


def test_a_wrong_number_of_classes_is_refused():
    tiny = MODELS["timm_resnet"]
    with pytest.raises(ValueError, match="`num_classes=7`, but the model has 4"):
        get_autolora_model(tiny.fresh(), num_classes=7)
    with pytest.raises(ValueError, match="2 label names for a model of 4 classes"):
        get_autolora_model(tiny.fresh(), label_names=["a", "b"], preprocessing=tiny.preprocessing)


# ---- configuration ----


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"mode": "lora"}, ["`mode`", "'full', 'adapter'", "'lora'"]),
        ({"layout": "conv"}, ["`layout`", "'released', 'peft'", "'conv'"]),
        ({"norm": "both"}, ["`norm`", "'shared', 'robust_stats', 'dual'", "'both'"]),
        ({"bias": "all"}, ["`bias='all'`"]),
        ({"use_dora": True}, ["`use_dora=True`"]),
        ({"init_lora_weights": "pissa"}, ["`init_lora_weights='pissa'`"]),
        ({"modules_to_save": ["fc"]}, ["`modules_to_save=['fc']`", "`mode='adapter'`"]),
        ({"lora_dropout": 0.1}, ["`lora_dropout=0.1`", "`layout='peft'`"]),
        ({"init_lora_weights": "gaussian"}, ["`init_lora_weights='gaussian'`", "`layout='peft'`"]),
        ({"r": 0}, ["`r`", "0"]),
        ({"r": -8}, ["`r`", "-8"]),
    ],
)
def test_bad_configurations_print_what_was_received(config, parts):
    with pytest.raises(ValueError) as caught:
        MODELS["timm_vit"].adapted(**config)
    assert all(part in str(caught.value) for part in parts)


def test_configuration_defaults():
    full, adapter = AutoLoraConfig(), AutoLoraConfig(mode="adapter")
    assert (full.mode, full.layout, full.norm, full.r, full.lora_alpha) == ("full", "released", "shared", 8, 1)
    assert (adapter.layout, adapter.norm, adapter.r, adapter.lora_alpha) == ("peft", "shared", 8, 16)
    assert AutoLoraConfig(mode="adapter", r=4).lora_alpha == 8
    assert AutoLoraConfig(lora_alpha=5, layout="peft").lora_alpha == 5


def test_the_callers_configuration_is_left_alone():
    config = AutoLoraConfig()
    model = get_autolora_model(MODELS["timm_vit"].fresh(), config)
    assert config.head is None
    assert config.target_modules is None
    assert model.autolora_config.head == "head"


def test_what_is_known_of_the_checkpoint():
    tiny = MODELS["timm_vit"]
    names, threat = list("abcd"), ThreatModel("l2", 0.5)
    model = get_autolora_model(tiny.fresh(), label_names=names, threat_model=threat)
    assert isinstance(model, AutoLoraModel)
    assert model.label_names == names
    assert model.threat_model == threat
    assert model.preprocessing.image_size == (IMAGE_SIZE, IMAGE_SIZE)
    assert get_autolora_model(tiny.fresh()).threat_model == ThreatModel("linf", 8 / 255)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_rank_pattern(mode, layout):
    model = MODELS["timm_resnet"].adapted(mode=mode, layout=layout, rank_pattern={"layer1.0.conv1": 3})
    ranks = {name: layer.r["natural"] for name, layer in model.lora_layers().items()}
    assert ranks.pop("layer1.0.conv1") == 3
    assert set(ranks.values()) == {8}


@pytest.mark.parametrize("layout", ["released", "peft"])
@pytest.mark.parametrize("mode", ["full", "adapter"])
@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unload_gives_the_deployed_model(name, mode, layout):
    model = MODELS[name].adapted(mode=mode, layout=layout)
    change_everything(model)
    images = model.pixel_space().normalize(pixels())
    with torch.no_grad():
        robust = logits_of(model(images))
        with model.route("natural"):
            assert not torch.allclose(logits_of(model(images)), robust, atol=1e-3)
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits_of(merged(images)), robust, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())


def test_head_must_give_the_logits():
    tiny = MODELS["timm_vit"]
    with pytest.raises(ValueError, match=r"'blocks\.0\.mlp\.fc1' is a Linear; the logits come from head"):
        get_autolora_model(tiny.fresh(), AutoLoraConfig(head="blocks.0.mlp.fc1"), preprocessing=tiny.preprocessing)


def test_stock_config_is_refused():
    with pytest.raises(TypeError, match="must be an AutoLoraConfig, got LoraConfig"):
        get_autolora_model(MODELS["timm_vit"].fresh(), LoraConfig())


# ---- modules that are carried whole ----


@pytest.mark.parametrize(
    ("name", "end", "found"),
    [
        ("timm_vit", ["norm1", "norm"], ["blocks.0.norm1", "blocks.1.norm1", "norm"]),
        ("hf_vit", ["layernorm_before"], ["vit.layers.0.layernorm_before", "vit.layers.1.layernorm_before"]),
        ("timm_resnet", ["conv1.0"], ["conv1.0"]),
    ],
)
def test_modules_to_save(tmp_path, name, end, found):
    """They train in the robust route alone, travel with the adapter, and stock PEFT loads them."""
    tiny = MODELS[name]
    expected = get_autolora_model(tiny.fresh(), AutoLoraConfig(mode="adapter"), preprocessing=tiny.preprocessing)
    model = get_autolora_model(
        tiny.fresh(), AutoLoraConfig(mode="adapter", modules_to_save=end), preprocessing=tiny.preprocessing
    )
    assert model.autolora_config.modules_to_save == found
    assert set(model._saved_modules()) == set(expected._saved_modules()) | set(found)
    images = pixels()
    assert torch.equal(model.pixel_space()(images), expected.pixel_space()(images))

    extra = [p for module in found for p in model._saved_modules()[module].parameters()]
    assert all(parameter.requires_grad for parameter in extra)
    for route, has_gradient in (("robust", True), ("natural", False)):
        model.zero_grad(set_to_none=True)
        model.pixel_space(route)(images).square().sum().backward()
        assert all((parameter.grad is not None) == has_gradient for parameter in extra)

    change_everything(model)
    model.save_pretrained(tmp_path)
    loaded = load_autolora_model(tmp_path, base_model=tiny.fresh())
    for route in ("robust", "natural"):
        assert torch.equal(loaded.pixel_space(route)(images), model.pixel_space(route)(images))
    assert loaded.autolora_config.modules_to_save == found
    stock = PeftModel.from_pretrained(tiny.fresh(), tmp_path).eval()
    normalised = model.pixel_space().normalize(images)
    assert torch.equal(logits_of(stock(normalised)), model.pixel_space()(images))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged(normalised)), loaded.pixel_space()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_save": ["nothing"]}, "'nothing', which VisionTransformer does not have"),
        ({"modules_to_save": ["blocks.0.mlp.fc1"]}, "overlaps with blocks.0.mlp.fc1"),
        ({"modules_to_save": ["blocks.0"]}, "overlaps with blocks.0.attn.qkv"),
        ({"modules_to_save": ["norm_pre"]}, "which has no weights"),
    ],
)
def test_modules_to_save_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        MODELS["timm_vit"].adapted(mode="adapter", **changes)
