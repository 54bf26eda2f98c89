"""Each route trains what it should and nothing else; switching leaves no trace."""

import pytest
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dS0, LayerNorm2d, RmsNorm2d
from tiny_models import LAYOUTS, MODELS, MODES, NORMS, VARIANTS, change_everything, pixels
from torchvision.ops import FrozenBatchNorm2d

from autolora_hf import PGD, AutoLoraConfig, get_autolora_model
from autolora_hf.objectives import AutoLora, Batch
from autolora_hf.pixels import Normalize
from autolora_hf.schedules import LossScalars


SCALARS = LossScalars(0.3, 4.2)
BATCH_NORM_MODELS = [name for name, tiny in MODELS.items() if tiny.batch_norm]


def training_batch():
    adversarial = (pixels(6, 10, torch.float64) + 0.03 * torch.randn(6, 3, 32, 32).double().sign()).clamp(0, 1)
    return Batch(pixels(6, 10, torch.float64), adversarial, torch.tensor([0, 1, 2, 3, 1, 0]))


def changed_model(name, mode="full", layout="released", norm="shared"):
    model = MODELS[name].adapted(mode=mode, layout=layout, norm=norm).double()
    change_everything(model)
    return model.train()


def objective_gradients(model, batch):
    """Gradients of one step through the routes, by parameter name."""
    routes = {name: model.pixel_space(name) for name in ("robust", "natural")}
    loss = AutoLora()(lambda route, images: routes[route](images), batch, SCALARS).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def reference_gradients(model, mode, head, batch):
    """The same from the definition: two vector-Jacobian products, each with respect to what its route trains.

    Nothing is blocked in the forward passes, which set the flags of the layers by hand.
    """
    normalize = Normalize(model.preprocessing, torch.float64)
    base = model.get_base_model()

    def forward(images, adapters):
        for layer in model.lora_layers().values():
            layer._disable_adapters, layer._active_adapter = not adapters, adapters
        output = base(normalize(images))
        return output if isinstance(output, torch.Tensor) else output.logits

    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in named if f".{head}." in name}
    natural_branch = {name for name in named if ".lora_A.natural" in name or ".lora_B.natural" in name}
    backbone = named.keys() - heads - natural_branch
    if mode == "adapter":
        # Of the backbone only the robust branch and the copies of the norms train.
        assert all(".lora_A.robust" in n or ".lora_B.robust" in n or ".modules_to_save.robust" in n for n in backbone)

    below = ["robust"] if mode == "adapter" else []
    swapped = []
    for name, replacement in model.natural_norms.items():
        parent = base.get_submodule(name.replace("/", ".").rpartition(".")[0])
        child = name.rpartition("/")[2]
        swapped.append((parent, child, parent._modules[child]))
        parent._modules[child] = replacement
    natural = forward(batch.pixels, [*below, "natural"])
    for parent, child, original in swapped:
        parent._modules[child] = original
    robust = forward(batch.adversarial, below)

    logits = {"natural": natural, "robust": robust}
    loss = AutoLora()(lambda route, images: logits[route], batch, SCALARS).loss
    weights = torch.autograd.grad(loss, [natural, robust], retain_graph=True)
    gradients = {}
    for output, weight, names in (
        (natural, weights[0], natural_branch | heads),
        (robust, weights[1], backbone | heads),
    ):
        names = sorted(names)
        # A parameter that its route does not reach (the affine of a norm that was swapped) has no gradient.
        found = torch.autograd.grad(output, [named[n] for n in names], weight, retain_graph=True, allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None:
                gradients[name] = gradients.get(name, 0) + gradient
    return gradients


def largest_difference(found, expected):
    """Largest difference relative to each parameter's largest gradient.

    Some gradients are zero but for rounding errors (biases of attention keys), so the scale has a floor.
    """
    floor = 1e-9 * max(gradient.abs().max() for gradient in expected.values())
    return max(
        ((found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=floor)).item()
        for name, gradient in expected.items()
    )


@pytest.mark.parametrize(("name", "mode", "layout", "norm"), VARIANTS)
def test_gradients_are_those_of_two_vector_jacobian_products(name, mode, layout, norm):
    batch = training_batch()
    expected = reference_gradients(changed_model(name, mode, layout, norm), mode, MODELS[name].head, batch)
    model = changed_model(name, mode, layout, norm)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    found = objective_gradients(model, batch)
    # Everything that trains gets a gradient in every step, which distributed training relies on.
    assert found.keys() == expected.keys() == set(trainable)
    assert largest_difference(found, expected) <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_without_masks_the_gradients_are_others(name, mode, layout):
    """Negative control: the comparison above would notice if nothing were blocked."""
    batch = training_batch()
    expected = reference_gradients(changed_model(name, mode, layout), mode, MODELS[name].head, batch)
    model = changed_model(name, mode, layout)
    for route in model._switch.routes.values():
        route.blocked.clear()
    assert largest_difference(objective_gradients(model, batch), expected) > 0.1


# ---- flags ----


def flags(model):
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def layer_flags(model):
    layers = [(layer._disable_adapters, layer.active_adapters) for layer in model.lora_layers().values()]
    norms = [module.track_running_stats for module in model.modules() if hasattr(module, "track_running_stats")]
    return layers, norms, [id(module) for module in model.get_base_model().modules()], model.current_route


@pytest.mark.parametrize(("name", "mode", "layout", "norm"), VARIANTS)
def test_a_route_leaves_no_trace(name, mode, layout, norm):
    model = MODELS[name].adapted(mode=mode, layout=layout, norm=norm)
    before = flags(model), layer_flags(model)
    for route in ("natural", "robust"):
        with model.route(route):
            assert model.current_route == route
        assert (flags(model), layer_flags(model)) == before
        with pytest.raises(RuntimeError, match="inside"), model.route(route):
            raise RuntimeError("inside")
        assert (flags(model), layer_flags(model)) == before


@pytest.mark.parametrize(("name", "mode", "layout", "norm"), VARIANTS)
def test_a_route_inside_another_trains_what_it_says(name, mode, layout, norm):
    model = MODELS[name].adapted(mode=mode, layout=layout, norm=norm)
    states = {"robust": (flags(model), layer_flags(model))}
    with model.route("natural"):
        states["natural"] = flags(model), layer_flags(model)
    assert states["natural"][0] != states["robust"][0]
    assert states["natural"][1] != states["robust"][1]

    def check(route):
        assert (flags(model), layer_flags(model)) == states[route]

    for outer in states:
        for inner in states:
            with model.route(outer):
                check(outer)
                with model.route(inner):
                    check(inner)
                    with pytest.raises(KeyError), model.route(outer):
                        check(outer)
                        raise KeyError
                    check(inner)
                check(outer)
            check("robust")


def test_what_the_caller_froze_stays_frozen():
    network = MODELS["timm_resnet"].fresh()
    frozen = {name for name, _ in network.named_parameters() if name.startswith(("conv1", "bn1", "layer1"))}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
    model = get_autolora_model(network, preprocessing=MODELS["timm_resnet"].preprocessing)
    base = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    for route in ("natural", "robust"):
        with model.route(route):
            assert not any(base[name].requires_grad for name in frozen)
    assert {name for name, parameter in base.items() if not parameter.requires_grad} == frozen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_an_attack_inside_a_route_leaves_no_trace(name, mode):
    model = MODELS[name].adapted(mode=mode).train()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with model.route("natural"):
        before = flags(model), layer_flags(model), [module.training for module in model.modules()]
        PGD(steps=2)(model.pixel_space("robust"), pixels(), torch.tensor([0, 1, 2, 3]))
        assert (flags(model), layer_flags(model), [module.training for module in model.modules()]) == before
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unknown_routes_are_refused():
    model = MODELS["hf_vit"].adapted()
    with pytest.raises(ValueError, match=r"Unknown route 'clean'; this model has 'robust', 'natural'"):
        model.pixel_space("clean")
    before = flags(model)
    with pytest.raises(ValueError, match="Unknown route 'clean'"), model.route("clean"):
        pass
    assert flags(model) == before


# ---- BatchNorm statistics ----


def statistics(model, route):
    """The running statistics that `route` sees, copied."""
    with model.route(route):
        return {
            name: tensor.clone()
            for name, tensor in model.get_base_model().state_dict().items()
            if "running" in name or "num_batches" in name
            # The caller's own layers stay below the copies that adapter mode trains.
            if ".original_module." not in name
        }


def changes(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BATCH_NORM_MODELS)
def test_running_statistics(name, mode, norm):
    model = MODELS[name].adapted(mode=mode, norm=norm).train()
    robust, natural = statistics(model, "robust"), statistics(model, "natural")
    assert len(robust) > 0

    model.pixel_space("natural")(pixels(8, 1))
    after = statistics(model, "robust"), statistics(model, "natural")
    if norm == "shared":
        assert changes(robust, after[0]) == robust.keys()
    else:
        assert changes(robust, after[0]) == set()
    assert changes(natural, after[1]) == (set() if norm == "robust_stats" else natural.keys())

    model.pixel_space("robust")(pixels(8, 2))
    final = statistics(model, "robust"), statistics(model, "natural")
    assert changes(after[0], final[0]) == robust.keys()
    assert changes(after[1], final[1]) == (set() if norm == "dual" else natural.keys())
    # One count for each pass that a set saw.
    passes = {"shared": (2, 2), "robust_stats": (1, 1), "dual": (1, 1)}[norm]
    for first, last, expected in ((robust, final[0], passes[0]), (natural, final[1], passes[1])):
        counts = [last[name] - first[name] for name in first if name.endswith("num_batches_tracked")]
        assert counts == [expected] * len(counts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BATCH_NORM_MODELS)
def test_robust_stats_normalises_as_shared_does(name, mode):
    """Batch statistics in training, running ones in evaluation: only the bookkeeping differs."""
    models = [changed_model(name, mode, norm=norm) for norm in ("shared", "robust_stats")]
    models[1].load_state_dict(models[0].state_dict())
    images = pixels(8, 3, torch.float64)
    for training in (False, True):
        outputs = [model.train(training).pixel_space("natural")(images) for model in models]
        assert torch.equal(*outputs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BATCH_NORM_MODELS)
def test_dual_norms_have_two_sets(name, mode):
    model = MODELS[name].adapted(mode=mode, norm="dual")
    norms = {n for n, m in MODELS[name].fresh().named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert {n.replace("/", ".") for n in model.natural_norms} == norms
    # The natural set keeps its affine parameters.
    assert not any(parameter.requires_grad for parameter in model.natural_norms.parameters())
    images = pixels()
    before = {route: model.pixel_space(route)(images) for route in ("robust", "natural")}
    with torch.no_grad():
        for module in model.natural_norms.values():
            module.running_mean += 1
    assert torch.equal(model.pixel_space("robust")(images), before["robust"])
    assert not torch.allclose(model.pixel_space("natural")(images), before["natural"])


# ---- norms of other kinds ----


def with_norms(make):
    """The tiny ResNet with every BatchNorm replaced."""
    network = MODELS["timm_resnet"].fresh()
    for name, module in list(network.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            network.set_submodule(name, make(module.num_features))
    return network


STATISTICS_NORMS = {
    "BatchNormAct2d": lambda channels: BatchNormAct2d(channels, apply_act=False),
    "SyncBatchNorm": torch.nn.SyncBatchNorm,
    "EvoNorm2dB0": EvoNorm2dB0,
    "EvoNorm2dB1": EvoNorm2dB1,
    "BatchNorm2d without affine": lambda channels: torch.nn.BatchNorm2d(channels, affine=False),
}
OTHER_NORMS = {
    "GroupNorm": lambda channels: torch.nn.GroupNorm(4, channels),
    "LayerNorm2d": LayerNorm2d,
    "RmsNorm2d": RmsNorm2d,
    "EvoNorm2dS0": lambda channels: EvoNorm2dS0(channels, group_size=4),
    "FrozenBatchNorm2d": FrozenBatchNorm2d,
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", STATISTICS_NORMS)
def test_norms_of_every_kind_with_statistics(kind, mode, norm):
    tiny, images = MODELS["timm_resnet"], pixels(6)
    network = with_norms(STATISTICS_NORMS[kind])
    model = get_autolora_model(network, AutoLoraConfig(mode=mode, norm=norm), preprocessing=tiny.preprocessing).train()
    robust, natural = statistics(model, "robust"), statistics(model, "natural")
    assert len(robust) > 0
    before = model.eval().pixel_space("natural")(images)
    model.train().pixel_space("natural")(images)
    assert changes(robust, statistics(model, "robust")) == (robust.keys() if norm == "shared" else set())
    assert changes(natural, statistics(model, "natural")) == (set() if norm == "robust_stats" else natural.keys())
    moved = not torch.allclose(model.eval().pixel_space("natural")(images), before, atol=1e-5)
    assert moved == (norm != "robust_stats")
    robust = statistics(model, "robust")
    model.train().pixel_space("robust")(images)
    assert changes(robust, statistics(model, "robust")) == robust.keys()
    PGD(steps=1)(model.pixel_space("robust"), images, torch.tensor([0, 1, 2, 3, 0, 1]))
    assert changes(robust, statistics(model, "robust")) == robust.keys()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", OTHER_NORMS)
def test_norms_without_statistics_have_one_mode(kind, mode):
    network, tiny = with_norms(OTHER_NORMS[kind]), MODELS["timm_resnet"]
    for norm in ("robust_stats", "dual"):
        with pytest.raises(ValueError, match="running statistics of BatchNorm, and this model has none"):
            get_autolora_model(network, AutoLoraConfig(mode=mode, norm=norm), preprocessing=tiny.preprocessing)
    model = get_autolora_model(network, AutoLoraConfig(mode=mode), preprocessing=tiny.preprocessing)
    assert not model.natural_norms
    affine = [p for name, p in model.named_parameters() if ".bn1." in name]
    assert all(parameter.requires_grad == (mode == "full") for parameter in affine)
