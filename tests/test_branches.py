"""Models with branches of every kind: start, gradients, files, merging, frozen copies, stock PEFT, what is refused."""

import copy
import json
import logging

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from test_trainer import NAMES, arguments, pictures
from tiny_models import IMAGE_SIZE, MODELS, MODES, change_everything, pixels
from torch import nn
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from autolora_hf import AutoLoraConfig, AutoLoraTrainer, get_autolora_model, load_autolora_model
from autolora_hf.branches import choose_targets, count_values
from autolora_hf.frozen import FrozenRoute
from autolora_hf.hub.export import export_onnx
from autolora_hf.hub.extraction import extract_adapter
from autolora_hf.hub.model_card import write_model_card
from autolora_hf.layers import BRANCHES, OutputBranch, Use, branch_parameters, can_merge
from autolora_hf.layout import ADAPTER_WEIGHTS, NATURAL_ADAPTER, NATURAL_FACTORS, ROBUST_FACTORS
from autolora_hf.saving import save_plain


# Configurations that fit the tiny models, whose layers are a few channels wide.
KINDS = {
    "lora": {},
    "lnlora": {"branch": "lnlora", "r": 4},
    "foura": {"branch": "foura", "r": 4},
    "gated foura": {"branch": "foura", "r": 4, "branch_args": {"gate": "hard"}},
    "efft": {"branch": "efft", "r": 4},
    "adakron": {"branch": "adakron", "r": 8},
    "dora": {"branch": "dora", "r": 4},
    "loha": {"branch": "loha", "r": 2},
    "loha, effective": {"branch": "loha", "branch_args": {"r": 2, "alpha": 6, "use_effective_conv2d": True}},
    "lokr": {"branch": "lokr", "r": 2, "branch_args": {"decompose_both": True, "decompose_factor": 4}},
    "hra": {"branch": "hra", "r": 2},
    "ia3": {"branch": "ia3"},
    "hira": {"branch": "hira", "r": 4},
    "oft": {"branch": "oft", "branch_args": {"oft_block_size": 4}},
    "oft, shared": {"branch": "oft", "branch_args": {"oft_block_size": 4, "block_share": True}},
    "miss": {"branch": "miss", "r": 4},
    "road": {"branch": "road", "branch_args": {"group_size": 8, "variant": "road_2"}},
}
UNMERGED = ("lnlora", "gated foura", "adakron")
PEFTS = [kind for kind, config in KINDS.items() if BRANCHES[config.get("branch", "lora")].is_pefts]
# Where the residual branches of the two ResNets end.
LAST_CONVOLUTIONS = {"timm_resnet": ["conv2"], "hf_resnet": ["layer.1.convolution"]}
LINEAR_ONLY = ("gated foura", "oft", "oft, shared", "miss", "road")

FITTING = [
    (kind, name, mode)
    for kind in KINDS
    for name in MODELS
    for mode in MODES
    if not (kind in LINEAR_ONLY and "resnet" in name)
]
# PEFT's layers are tried on one model of each library in every run, on the others among the slow tests.
VARIANTS = [
    pytest.param(
        *variant, marks=pytest.mark.slow if variant[0] in PEFTS and variant[1] in ("timm_vit", "hf_resnet") else ()
    )
    for variant in FITTING
]


def adapted(kind, name, mode, **changes):
    config = dict(KINDS[kind])
    if kind == "adakron" and "resnet" in name:
        config["target_modules"] = LAST_CONVOLUTIONS[name]
    return MODELS[name].adapted(mode=mode, **{**config, **changes})


def changed(kind, name, mode, **changes):
    model = adapted(kind, name, mode, **changes)
    change_everything(model)
    return model


def logits(model, images=None):
    images = pixels(dtype=next(model.parameters()).dtype) if images is None else images
    with torch.no_grad():
        return {route: model.pixel_space(route)(images) for route in model.routes}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def output_logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def branch_of(model, adapter):
    """The parameters of one branch, each once, with a name for each."""
    found = {}
    for name, layer in model.lora_layers().items():
        for key, parameter in branch_parameters(layer, adapter).items():
            found.setdefault(parameter, f"{name}.{key}")
    return {name: parameter for parameter, name in found.items()}


# ---- start and gradients ----


@pytest.mark.parametrize(("kind", "name", "mode"), VARIANTS)
def test_every_route_starts_at_the_backbone(kind, name, mode):
    model = adapted(kind, name, mode)
    normalised = model.pixel_space().normalize(pixels())
    with torch.no_grad():
        expected = output_logits(MODELS[name].fresh()(normalised))
    for found in logits(model).values():
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "name", "mode"), VARIANTS)
def test_each_route_trains_its_own_branch(kind, name, mode):
    model = changed(kind, name, mode)
    branches = {adapter: branch_of(model, adapter) for adapter in model.adapters}
    assert set(branches) == ({"natural"} if mode == "full" else {"robust", "natural"})
    for route in model.routes:
        model.zero_grad()
        model.pixel_space(route)(pixels()).square().sum().backward()
        for adapter, parameters in branches.items():
            # The natural route's gradient stops at the robust branch below its own.
            if adapter == route:
                assert all(parameter.grad is not None for parameter in parameters.values())
                moved = [name for name, p in parameters.items() if p.grad.any() or ".lora_gate" in name]
                assert moved == list(parameters)
            else:
                assert all(parameter.grad is None for parameter in parameters.values())


@pytest.mark.parametrize(("kind", "name", "mode"), VARIANTS)
def test_without_adapters_it_is_the_base(kind, name, mode):
    model = changed(kind, name, mode)
    normalised = model.pixel_space().normalize(pixels())
    before = logits(model)
    with torch.no_grad(), model.disable_adapter():
        bare = output_logits(model(normalised))
    expected = before["robust"] if mode == "full" else output_logits(MODELS[name].fresh()(normalised))
    assert torch.equal(bare, expected)
    assert same(logits(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_one_route_alone(kind):
    """Fine-tuning with the robust branch alone (LoRA-AT and the like), and a natural route without a branch."""
    for natural_route, routes in (("none", ("robust",)), ("plain", ("robust", "natural"))):
        model = changed(kind, "hf_vit", "adapter", natural_route=natural_route)
        assert model.routes == routes and model.adapters == ("robust",)
        expected = logits(model)
        model = model.double()
        frozen = FrozenRoute(model)
        torch.testing.assert_close(frozen(pixels().double()), logits(model)["robust"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(logits(model)["robust"].float(), expected["robust"], rtol=1e-4, atol=1e-4)


# ---- saving ----


@pytest.mark.parametrize(("kind", "name", "mode"), VARIANTS)
def test_round_trip(tmp_path, kind, name, mode):
    model = changed(kind, name, mode)
    expected = logits(model)
    assert not torch.equal(expected["robust"], expected["natural"])
    model.save_pretrained(tmp_path)
    assert same(logits(model), expected)
    loaded = load_autolora_model(tmp_path, base_model=MODELS[name].fresh() if mode == "adapter" else None)
    assert same(logits(loaded), expected)
    assert same(loaded.state_dict(), model.state_dict())
    configs = [{**vars(m.autolora_config), "target_modules": list(m.lora_layers())} for m in (model, loaded)]
    assert configs[0] == configs[1]
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert trainable[0] == trainable[1]

    # Every parameter of a branch stands in the files, once.
    of_files = {p: load_file(p) for p in tmp_path.rglob("*.safetensors") if p.name != "model.safetensors"}
    stored = sum(tensor.numel() for tensors in of_files.values() for tensor in tensors.values())
    whole = sum(p.numel() for adapter in model.adapters for p in branch_of(model, adapter).values())
    if kind != "lora":
        saved = sum(t.numel() for module in model._saved_modules().values() for t in module.state_dict().values())
        assert stored == whole + saved
    written = {str(path.relative_to(tmp_path)) for path in of_files}
    natural = NATURAL_ADAPTER if kind == "lora" or (kind in PEFTS and mode == "full") else NATURAL_FACTORS
    robust = ADAPTER_WEIGHTS if kind == "lora" or kind in PEFTS else ROBUST_FACTORS
    assert written == ({natural} if mode == "full" else {natural, robust})

    other = adapted(kind, name, mode)
    other.load_weights(tmp_path)
    assert same(logits(other), expected)


@pytest.mark.parametrize(("kind", "name", "mode"), [variant for variant in FITTING if variant[0] in PEFTS])
def test_stock_peft_loads_the_adapter(tmp_path, kind, name, mode):
    """In mode `adapter` the robust one, in mode `full` the natural one on the model beside it."""
    model, base = changed(kind, name, mode), MODELS[name].fresh()
    model.save_pretrained(tmp_path)
    normalised, expected = model.pixel_space().normalize(pixels()), logits(model)
    if mode == "full":
        base.load_state_dict(copy.deepcopy(model).merge_and_unload().state_dict())
        stock = PeftModel.from_pretrained(base, tmp_path, subfolder="natural").eval()
        torch.testing.assert_close(output_logits(stock(normalised)), expected["natural"], rtol=1e-5, atol=1e-5)
        return
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == ("LORA" if kind == "dora" else KINDS[kind]["branch"].upper())
    stock = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(output_logits(stock(normalised)), expected["robust"])
    merged = stock.merge_and_unload()
    torch.testing.assert_close(output_logits(merged(normalised)), expected["robust"], rtol=1e-4, atol=1e-4)


# ---- merging and frozen copies ----


@pytest.mark.parametrize(("kind", "name", "mode"), VARIANTS)
def test_merging(tmp_path, kind, name, mode):
    model = changed(kind, name, mode).double()
    images = pixels(dtype=torch.float64)
    expected, normalised = logits(model)["robust"], model.pixel_space().normalize(images)
    if mode == "adapter" and kind in UNMERGED:
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        for merge in (copy.deepcopy(model).merge_and_unload, lambda: save_plain(model, tmp_path / "plain")):
            with pytest.raises(ValueError, match="cannot be merged"):
                merge()
        assert same(model.state_dict(), before) and not (tmp_path / "plain").exists()
        assert torch.equal(logits(model)["robust"], expected)
        return
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == MODELS[name].fresh().state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(output_logits(merged(normalised)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "name", "mode"), VARIANTS)
def test_a_frozen_copy_is_the_live_route(kind, name, mode):
    model = adapted(kind, name, mode).double()
    images = pixels(dtype=torch.float64)
    copies = {route: FrozenRoute(model, route) for route in model.routes}
    for change in (lambda: None, lambda: change_everything(model)):
        change()
        for route, frozen in copies.items():
            expected = logits(model, images)[route]
            torch.testing.assert_close(frozen.refresh()(images).detach(), expected, rtol=1e-10, atol=1e-10)
            # Attacks follow the gradient of the copy.
            gradients = []
            for function in (frozen, model.pixel_space(route)):
                start = images.clone().requires_grad_()
                gradients.append(torch.autograd.grad(function(start).logsumexp(1).sum(), start)[0])
            assert (gradients[0] - gradients[1]).norm() <= 1e-9 * gradients[1].norm()
    for route, frozen in copies.items():
        left = [module for module in frozen.modules() if hasattr(module, "base_layer")]
        adapters = ["robust"] if mode == "adapter" else []
        adapters += ["natural"] if route == "natural" else []
        # A branch layer stays only where it has to.
        assert bool(left) == any(adapters and not can_merge(layer, adapters) for layer in model.lora_layers().values())
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert model.current_route == "robust"


@pytest.mark.parametrize("kind", ["dora", "lokr", "hra", "ia3", "efft", "foura"])
def test_a_frozen_copy_leaves_the_live_layers_alone(kind):
    model = changed(kind, "hf_vit", "adapter")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    FrozenRoute(model, "natural").refresh()
    assert same(model.state_dict(), before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert not any(layer.merged for layer in model.lora_layers().values())


# ---- factors that layers share ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_shared_factors(tmp_path, name, mode):
    model = changed("efft", name, mode)
    layers = list(model.lora_layers().values())
    first, *others = layers
    shares = [layer for layer in others if layer.lora_U["natural"] is first.lora_U["natural"]]
    assert shares and all(sorted(layer.sides) == sorted(first.sides) for layer in shares)
    expected = logits(model)
    for copied in (copy.deepcopy(model), copy.deepcopy(model).double().float(), copy.deepcopy(model)):
        assert len(list(copied.parameters())) == len(list(model.parameters()))
        assert same(logits(copied), expected)
        a, b = list(copied.lora_layers().values())[:2]
        assert (a.lora_U["natural"] is b.lora_U["natural"]) == (sorted(a.sides) == sorted(b.sides))
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / NATURAL_FACTORS)
    keys = [key for key in held if ".lora_" in key]
    assert len(keys) == len(branch_of(model, "natural")) < 3 * len(layers)
    loaded = load_autolora_model(tmp_path, base_model=MODELS[name].fresh() if mode == "adapter" else None)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))


# ---- which layers, and how many parameters ----


def vit_b():
    """ViT-B/16 with separate projections, without memory for it, and how its forward would use its layers."""
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(num_labels=10))
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return model, {name: Use(called=True, order=order) for order, name in enumerate(layers, 1)}


@pytest.mark.parametrize(
    ("kind", "r", "layers", "expected"),
    [
        ("lnlora", 8, 73, 167_424 * 9),
        ("lnlora", 24, 73, 167_424 * 25),
        ("efft", 16, 72, 5_376 * 16 + 6 * 16**2),
        ("efft", 32, 72, 5_376 * 32 + 6 * 32**2),
        ("adakron", 48, 12, 12 * 49_936),
        ("lora", 8, 72, 165_888 * 8),
        ("foura", 8, 72, 165_888 * 8),
        ("dora", 8, 72, 165_888 * 8 + 12 * (5 * 768 + 3072)),
        ("ia3", 8, 72, 12 * (5 * 768 + 3072)),
    ],
)
def test_parameters_of_a_vit(kind, r, layers, expected):
    model, uses = vit_b()
    config = AutoLoraConfig(branch=kind, r=r, mode="adapter", head="classifier")
    names = choose_targets(model, config, uses)
    assert len(names) == layers
    assert count_values(config, {name: model.get_submodule(name) for name in names}) == expected


@pytest.mark.parametrize(("kind", "name", "mode"), VARIANTS)
def test_what_is_counted_is_what_is_made(kind, name, mode):
    model = adapted(kind, name, mode)
    layers = {key: layer.get_base_layer() for key, layer in model.lora_layers().items()}
    made = sum(parameter.numel() for parameter in branch_of(model, "natural").values())
    assert count_values(model.autolora_config, layers) == made


@pytest.mark.parametrize(
    ("name", "extra"), [("timm_vit", "patch_embed.proj"), ("hf_vit", "vit.embeddings.patch_embeddings.projection")]
)
def test_lnlora_also_sits_on_the_patch_embedding(name, extra):
    others = set(adapted("foura", name, "full").lora_layers())
    assert set(adapted("lnlora", name, "full").lora_layers()) - others in ({extra}, set())
    assert extra in adapted("lnlora", name, "full").lora_layers()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm_vit", ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]),
        ("hf_vit", ["vit.layers.0.mlp.fc2", "vit.layers.1.mlp.fc2"]),
    ],
)
def test_adakron_follows_the_mlps(name, expected):
    model = adapted("adakron", name, "full")
    assert list(model.lora_layers()) == expected


def test_adakron_on_a_swin():
    """The reduction between stages is no MLP."""
    config = SwinConfig(
        image_size=IMAGE_SIZE, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4, num_labels=4
    )
    network = SwinForImageClassification(config).eval()
    model = get_autolora_model(network, AutoLoraConfig(branch="adakron"), preprocessing=MODELS["hf_vit"].preprocessing)
    names = list(model.lora_layers())
    assert len(names) == 2 and all("blocks" in name and "reduction" not in name for name in names)


def test_oft_leaves_out_what_peft_takes_for_a_convolution():
    """A network of channels last calls linear layers with four dimensions."""
    network = timm.create_model("test_mambaout", num_classes=4)
    with pytest.raises(ValueError, match="'oft', which fits linear layers that are called with N x tokens x channels"):
        get_autolora_model(network, AutoLoraConfig(**KINDS["oft"]), preprocessing=MODELS["hf_vit"].preprocessing)


@pytest.mark.parametrize("name", ["timm_resnet", "timm_vit"])
def test_ranks_of_single_layers(tmp_path, name):
    layer = next(iter(adapted("lnlora", name, "full").lora_layers()))
    model = changed("lnlora", name, "adapter", rank_pattern={layer: 2}, alpha_pattern={layer: 5})
    assert model.lora_layers()[layer].lora_A["robust"].shape[0] == 2
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "autolora_config.json").read_text())["config"]["rank_pattern"] == {layer: 2}
    loaded = load_autolora_model(tmp_path, base_model=MODELS[name].fresh())
    assert same(logits(loaded), logits(model))


# ---- the hard gate ----


def test_the_hard_gate_warns(caplog):
    with caplog.at_level(logging.WARNING, "autolora_hf.branches"):
        get_autolora_model(
            MODELS["timm_vit"].fresh(),
            AutoLoraConfig(branch="foura", branch_args={"gate": "hard"}),
            preprocessing=MODELS["timm_vit"].preprocessing,
        )
    (record,) = [record for record in caplog.records if record.name == "autolora_hf.branches"]
    assert "masks gradients" in record.getMessage() and "Square" in record.getMessage()


def test_an_attack_sees_through_the_hard_gate():
    """With gates that open and close, the gradient of the input passes through them."""
    model = changed("gated foura", "timm_vit", "adapter")
    gates = []
    with torch.no_grad():
        for layer in model.lora_layers().values():
            layer.lora_gate["robust"].second.weight.mul_(20)
            layer.lora_B["robust"].mul_(10)
            layer.lora_gate["robust"].register_forward_hook(lambda module, inputs, output: gates.append(output))
    images = pixels().requires_grad_()
    with model.route("robust"):
        model.pixel_space()(images).logsumexp(1).sum().backward()
    values = torch.cat([gate.detach().flatten() for gate in gates])
    assert set(values.tolist()) == {0.0, 1.0}
    assert images.grad.abs().max() > 0
    assert all(layer.lora_gate["robust"].slope.grad.abs() > 0 for layer in model.lora_layers().values())


# ---- what is refused ----


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"branch": "unknown"}, "`branch` must be one of 'lora', 'lnlora'"),
        ({"branch": ["lora"]}, "`branch` must be one of"),
        ({"branch": "boft"}, "'boft' cannot be a `branch`: it keeps a matrix.*`branch='oft'`"),
        ({"branch": "vera"}, "'vera' cannot be a `branch`: all layers share its random projections"),
        ({"use_dora": True}, "use `branch='dora'`"),
        (
            {"branch": "loha", "branch_args": {"target_modules": "x"}},
            "cannot have 'target_modules'. Possible: 'alpha'",
        ),
        ({"branch": "loha", "branch_args": {"auto_mapping": {}}}, "cannot have 'auto_mapping'"),
        ({"branch": "loha", "branch_args": {"init_weights": False}}, "cannot have 'init_weights'"),
        ({"branch": "loha", "branch_args": {"alpha": "8"}}, "branch_args.alpha must be a number"),
        ({"branch": "loha", "branch_args": {"module_dropout": 2}}, "branch_args.module_dropout must be a number"),
        ({"branch": "loha", "branch_args": ["alpha"]}, "`branch_args` must be a dictionary"),
        ({"branch": "loha", "lora_alpha": 3}, "`lora_alpha=3` means nothing to branch 'loha'"),
        ({"branch": "loha", "lora_dropout": 0.1}, "`lora_dropout=0.1` means nothing"),
        ({"branch": "loha", "r": 0}, "`r` must be a positive integer, got 0"),
        ({"branch": "loha", "branch_args": {"r": "9"}}, "`r` must be a positive integer, got '9'"),
        ({"branch": "lnlora", "init_lora_weights": "gaussian"}, "`init_lora_weights='gaussian'` means nothing"),
        ({"branch": "efft", "rank_pattern": {"conv1": 2}}, "`rank_pattern=.*means nothing to branch 'efft'"),
        ({"branch": "foura", "layout": "released"}, "`layout='released'` means nothing to branch 'foura'"),
        ({"branch": "foura", "branch_args": {"gate": "soft"}}, "branch_args.gate must be one of 'hard'"),
        ({"branch": "adakron", "r": 6}, "must be a multiple of 4, got r=6"),
        ({"branch": "hra", "r": 3}, "must be a multiple of 2, got r=3"),
        ({"branch": "ia3", "r": 4}, "`r=4` means nothing to branch 'ia3'"),
        ({"branch": "ia3", "branch_args": {"feedforward_modules": [".*"]}}, "cannot have 'feedforward_modules'"),
        ({"branch_args": {"gate": "hard"}}, "`branch_args` of branch 'lora' cannot have 'gate'. Possible: none"),
    ],
    ids=str,
)
def test_bad_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        AutoLoraConfig(**config)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("timm_resnet", {"branch": "oft"}, "no layer for a branch of kind 'oft', which fits linear layers"),
        ("hf_resnet", {"branch": "road"}, "no layer for a branch of kind 'road'"),
        ("timm_resnet", {"branch": "adakron"}, "has no MLP in its blocks.*target_modules"),
        ("timm_resnet", {"branch": "oft", "target_modules": ["conv2"]}, "does not fit: layer1.0.conv2 .Conv2d"),
        ("timm_resnet", {"branch": "miss", "target_modules": ["conv2"]}, "'miss' does not fit"),
        ("hf_vit", {"branch": "road"}, "cannot be made on .*Linear.*64"),
    ],
    ids=str,
)
def test_layers_that_cannot_carry_a_kind(name, config, message):
    network = MODELS[name].fresh()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        get_autolora_model(network, AutoLoraConfig(**config), preprocessing=MODELS[name].preprocessing)
    assert same(network.state_dict(), before)


@pytest.mark.parametrize("kind", ["foura", "gated foura", "hra", "oft"])
def test_wide_layers_are_refused_before_memory_is_spent(kind):
    config = AutoLoraConfig(**KINDS[kind])
    layers = {f"blocks.{n}": nn.Linear(5_000 + n, 6_000, device="meta") for n in range(12)}
    with pytest.raises(ValueError, match=r"square matrices.*up to"):
        count_values(config, layers)
    assert count_values(config, {"blocks.0": nn.Linear(5_000, 6_000, device="meta")}) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch": "os"}, "config.branch must be one of"),
        ({"branch": "boft"}, "config.branch must be one of"),
        ({"branch": 1}, "config.branch must be one of"),
        ({"branch_args": "alpha"}, "config.branch_args must be an object"),
        ({"branch_args": {"target_modules": ".*"}}, "cannot have 'target_modules'"),
        ({"branch_args": {"base_model_name_or_path": "http://somewhere"}}, "cannot have 'base_model_name_or_path'"),
        ({"branch_args": {"alpha": 1e300}}, "branch_args.alpha must be a number between"),
        ({"branch_args": {"alpha": True}}, "branch_args.alpha must be a number"),
        ({"branch_args": {f"x{n}": 1 for n in range(100)}}, "an object of at most 50 entries"),
        ({"branch_args": {"alpha\n": 1}}, "one line of printable"),
        ({"r": 60_000, "lora_alpha": 120_000}, "the ranks cannot be right"),
        ({"r": 20_000, "lora_alpha": 40_000}, "the ranks cannot be right"),
        ({"r": 3, "lora_alpha": 6}, "of another shape"),
        ({"r": 60_000}, "means nothing to branch 'loha'"),
        ({"branch": "lokr"}, "missing"),
    ],
    ids=str,
)
def test_records_of_strangers(tmp_path, changes, message):
    changed("loha", "hf_vit", "adapter").save_pretrained(tmp_path)
    path = tmp_path / "autolora_config.json"
    content = json.loads(path.read_text())
    content["config"] |= changes
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_autolora_model(tmp_path, base_model=MODELS["hf_vit"].fresh())


def test_a_record_without_kinds_is_one_of_lora(tmp_path):
    """Files of releases before there were other kinds."""
    model = changed("lora", "hf_vit", "adapter")
    model.save_pretrained(tmp_path)
    path = tmp_path / "autolora_config.json"
    content = json.loads(path.read_text())
    for name in ("branch", "branch_args"):
        del content["config"][name]
    path.write_text(json.dumps(content))
    loaded = load_autolora_model(tmp_path, base_model=MODELS["hf_vit"].fresh())
    assert same(logits(loaded), logits(model))


# ---- further ----


@pytest.mark.parametrize(
    ("kind", "mode"), [("efft", "adapter"), ("lnlora", "adapter"), ("gated foura", "adapter"), ("hra", "full")]
)
def test_training_and_going_on(tmp_path, kind, mode):
    """Every parameter of a branch moves, and an interrupted run ends with the same bits."""

    def run(resume=None):
        torch.manual_seed(0)
        model = MODELS["hf_vit"].adapted(num_classes=len(NAMES), mode=mode, **KINDS[kind])
        trainer = AutoLoraTrainer(model, arguments(tmp_path, save_strategy="epoch"), train_dataset=pictures())
        start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        trainer.train(resume_from_checkpoint=resume)
        return model, start

    model, start = run()
    adapters = {f".{adapter}" for adapter in model.adapters}
    moved = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, start[key])]
    own = [key for key in start if any(f"{name}." in f"{key}." for name in adapters) and "modules_to_save" not in key]
    # A sum of scores has no gradient towards their common shift.
    assert {key for key in own if "lora_gate" not in key} <= set(moved)
    first = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert same(run(str(first))[0].state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("kind", "mode", "said"),
    [
        ("lnlora", "adapter", ["An adapter (LNLoRA) for", "Stock PEFT has no LNLoRA layers", "LNLoRA with r = 4"]),
        ("loha", "adapter", ["An adapter (LoHa) for", "from peft import PeftModel", "--format checkpoint"]),
        ("ia3", "full", ["a (IA)3 branch of its own", "--format checkpoint"]),
        ("lora", "adapter", ["A LoRA adapter for", 'subfolder="natural"', "--format checkpoint"]),
    ],
)
def test_the_card_names_the_kind(tmp_path, kind, mode, said):
    model = changed(kind, "hf_vit", mode)
    model.training_plan = {"objective": "autolora"}
    text = write_model_card(tmp_path, model, name="someone/model").read_text()
    for part in said:
        assert part in text
    assert ("--format checkpoint" in text) == (kind != "lnlora")
    assert ('subfolder="natural"' in text) == (kind == "lora")
    ModelCard(text).data.to_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [("lnlora", "hf_vit"), ("gated foura", "timm_vit"), ("adakron", "timm_resnet"), ("oft", "timm_vit")],
)
def test_onnx_keeps_what_cannot_be_merged(tmp_path, kind, name):
    model = changed(kind, name, "adapter")
    for route in model.routes:
        assert export_onnx(model, tmp_path / "model.onnx", route=route).max_difference < 1e-5


@pytest.mark.parametrize("kind", ["lokr", "lnlora", "efft"])
def test_extraction_does_not_mind_the_kind(kind):
    """What training changed in the backbone, whatever branch the natural route had."""
    model = changed(kind, "timm_vit", "full")
    extraction = extract_adapter(model, MODELS["timm_vit"].fresh(), rank=2)
    assert extraction.model.autolora_config.branch == "lora"
    assert extraction.total_explained > 0


def test_dropout_of_pefts_kinds_is_off_in_attacks():
    model = changed("loha", "hf_vit", "adapter", branch_args={"r": 2, "rank_dropout": 0.5, "module_dropout": 0.5})
    model.train()
    frozen = FrozenRoute(model)
    expected = logits(model.eval())["robust"]
    torch.testing.assert_close(frozen(pixels()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lnlora", "adakron", "gated foura", "dora", "efft"])
def test_recomputed_blocks_have_the_same_gradients(kind):
    """Activation checkpointing runs a block a second time, in its route."""
    model = changed(kind, "timm_vit", "adapter").train()
    gradients = []
    for enable in (False, True):
        if enable:
            model.activation_checkpointing_enable()
        model.zero_grad()
        loss = model.pixel_space("natural")(pixels()).square().sum() + model.pixel_space("robust")(pixels()).sum()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


def test_kinds_that_cannot_be_merged_are_known():
    layers = adapted("lnlora", "timm_vit", "adapter").lora_layers().values()
    assert all(isinstance(layer, OutputBranch) and not can_merge(layer, ["robust"]) for layer in layers)
