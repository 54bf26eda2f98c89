"""Activation checkpointing: the same gradients and statistics in both routes, or a refusal."""

import copy
import re
import threading
from contextlib import contextmanager, nullcontext

import pytest
import timm
import torch
from test_gradient_masks import flags, layer_flags
from test_trainer import NAMES, arguments, copied_state, pictures, same
from tiny_models import HALF, IMAGENET, LAYOUTS, MODELS, MODES, NORMS, TinyModel, change_everything, pixels
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint
from transformers import (
    MobileViTConfig,
    MobileViTForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from autolora_hf import (
    PGD,
    AutoLoraConfig,
    AutoLoraTrainer,
    checkpointing,
    get_autolora_model,
    load_autolora_model,
)
from autolora_hf.attacks.pgd import logits_of
from autolora_hf.frozen import FrozenRoute
from autolora_hf.objectives import AutoLora, Batch
from autolora_hf.schedules import LossScalars
from autolora_hf.training.diagnosis import DiagnosisCallback
from autolora_hf.training.redirect import call_inside


def _mobilevit(num_classes):
    config = MobileViTConfig(
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[4, 8, 8, 8, 8, 8, 16],
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=32,
        hidden_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        num_labels=num_classes,
    )
    return MobileViTForImageClassification(config)


def _swin(num_classes):
    """Its stages are checkpointed, and the layers in them too."""
    config = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
        drop_path_rate=0.0,
        num_labels=num_classes,
    )
    return SwinForImageClassification(config)


# BatchNorm in a transformers model, and checkpointed blocks inside of checkpointed blocks.
OTHERS = {
    "hf_mobilevit": TinyModel(_mobilevit, IMAGENET, "classifier", batch_norm=True),
    "hf_swin": TinyModel(_swin, HALF, "classifier", batch_norm=False),
}
TINY = MODELS | OTHERS
# transformers has no activation checkpointing for its ResNet.
SUPPORTED = [name for name in MODELS if name != "hf_resnet"]
VARIANTS = [
    *(
        (name, mode, layout, norm)
        for name in SUPPORTED
        for mode in MODES
        for layout in LAYOUTS
        for norm in (NORMS if MODELS[name].batch_norm else NORMS[:1])
    ),
    ("hf_mobilevit", "full", "peft", "robust_stats"),
    ("hf_mobilevit", "adapter", "peft", "shared"),
    ("hf_swin", "full", "peft", "shared"),
    ("hf_swin", "adapter", "peft", "shared"),
]
# A layer in every checkpointed block, near its beginning.
FIRST_LAYERS = {"timm_resnet": r"layer\d\.\d\.conv1", "timm_vit": r"\.norm1", "hf_vit": r"\.layernorm_before"}


def changed_model(name, mode="full", layout="released", norm="shared"):
    model = TINY[name].adapted(mode=mode, layout=layout, norm=norm).double()
    change_everything(model)
    return model.train()


def objective(model):
    """The loss of one step, whose graph reaches through both routes."""
    images = pixels(6, 10, torch.float64)
    adversarial = (images + 0.03 * (pixels(6, 11, torch.float64) - 0.5).sign()).clamp(0, 1)
    batch = Batch(images, adversarial, torch.tensor([0, 1, 2, 3, 1, 0]))
    routes = {name: model.pixel_space(name) for name in ("robust", "natural")}
    return AutoLora()(lambda route, images: routes[route](images), batch, LossScalars(0.3, 4.2)).loss


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def step(model, seed=5):
    """Gradients, state and the next random number after one objective step."""
    torch.manual_seed(seed)
    objective(model).backward()
    return gradients(model), copied_state(model), torch.rand(1)


def assert_same_step(found, expected):
    assert found[0].keys() == expected[0].keys()
    assert len(found[0]) > 0
    for name, gradient in expected[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-9, atol=1e-12)
    assert same(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


def checkpointed(model, **options):
    model.activation_checkpointing_enable(**options)
    assert model.is_activation_checkpointing
    return model


@contextmanager
def counted(model, pattern):
    """Numbers of calls of the layers whose name ends in `pattern`."""
    counts = {name: 0 for name, _ in model.named_modules() if re.search(f"{pattern}$", name)}

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in counts]
    yield counts
    for hook in hooks:
        hook.remove()


# ---- the same result ----


@pytest.mark.parametrize(("name", "mode", "layout", "norm"), VARIANTS)
def test_a_step_is_the_same(name, mode, layout, norm):
    expected = step(changed_model(name, mode, layout, norm))
    model = checkpointed(changed_model(name, mode, layout, norm))
    before = flags(model), layer_flags(model)
    assert_same_step(step(model), expected)
    assert (flags(model), layer_flags(model)) == before
    assert torch.utils.checkpoint.checkpoint is checkpoint


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FIRST_LAYERS)
def test_blocks_run_twice(name, mode):
    model = changed_model(name, mode)
    for enabled, expected in ((False, 2), (True, 4), (False, 2)):
        if enabled:
            checkpointed(model)
        else:
            model.activation_checkpointing_disable()
        with counted(model, FIRST_LAYERS[name]) as counts:
            loss = objective(model)
            assert len(counts) >= 2
            assert set(counts.values()) == {2}, "the two routes"
            loss.backward()
            assert set(counts.values()) == {expected}


def test_every_n_layers():
    expected = step(changed_model("hf_vit"))
    model = checkpointed(changed_model("hf_vit"), every_n_layers=2)
    with counted(model, FIRST_LAYERS["hf_vit"]) as counts:
        assert_same_step(step(model), expected)
    assert sorted(counts.values()) == [2, 4]


@pytest.mark.parametrize(
    ("name", "mode", "norm"), [(n, m, norm) for n, m, layout, norm in VARIANTS if layout == "peft"]
)
def test_without_the_route_the_result_is_wrong(monkeypatch, name, mode, norm):
    """Negative control: a repetition in whatever state the model is in."""
    expected = step(changed_model(name, mode, "peft", norm))
    model = checkpointed(changed_model(name, mode, "peft", norm))
    monkeypatch.setattr(checkpointing._Pass, "again", lambda self: nullcontext())
    with pytest.raises((CheckpointError, AssertionError)):
        assert_same_step(step(model), expected)


@pytest.mark.parametrize("mode", MODES)
def test_without_care_batches_count_twice(monkeypatch, mode):
    """Negative control: only the statistics notice, not the gradients."""
    expected = step(changed_model("timm_resnet", mode))
    model = checkpointed(changed_model("timm_resnet", mode))
    monkeypatch.setattr(checkpointing.targets, "statistics_norms", lambda network: {})
    found = step(model)
    assert_same_step((found[0], expected[1], found[2]), expected)
    different = {key for key in expected[1] if not torch.equal(found[1][key], expected[1][key])}
    assert any("num_batches" in key for key in different)
    assert all("num_batches" in key or "running" in key for key in different)


class OldStatistics(nn.BatchNorm2d):
    """Normalises by the statistics of the batches before, also in training."""

    def forward(self, x):
        mean, std = self.running_mean.clone(), (self.running_var + self.eps).sqrt()
        if self.training:
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(x.mean((0, 2, 3)), 0.3)
                self.running_var.lerp_(x.var((0, 2, 3)), 0.3)
        shape = (1, -1, 1, 1)
        return (x - mean.view(shape)) / std.view(shape) * self.weight.view(shape) + self.bias.view(shape)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", MODES)
def test_norms_see_the_statistics_that_they_saw(mode, norm):
    """The second route has changed them by the time that the first one is repeated."""

    def build():
        network = MODELS["timm_resnet"].fresh()
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = OldStatistics
        config = AutoLoraConfig(mode=mode, norm=norm)
        torch.manual_seed(0)
        model = get_autolora_model(network, config, preprocessing=IMAGENET).double()
        change_everything(model)
        return model.train()

    def run(model):
        loss = objective(model)
        loss.backward(retain_graph=True)
        first = gradients(model)
        model.zero_grad()
        loss.backward()
        assert_same_step((gradients(model), {}, torch.zeros(1)), (first, {}, torch.zeros(1)))
        return first, copied_state(model), torch.zeros(1)

    assert any(isinstance(module, OldStatistics) for module in build().modules())
    assert_same_step(run(checkpointed(build())), run(build()))


def _random_models():
    timm_options = {"num_classes": 4, "drop_path_rate": 0.4, "drop_rate": 0.2}
    vit = {"img_size": 32, "depth": 2, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2}
    hf = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "hidden_size": 16, "num_hidden_layers": 2}
    hf |= {"num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8, "num_labels": 4}
    return {
        "timm_resnet": (lambda: timm.create_model("test_resnet", **timm_options), IMAGENET, {}),
        "timm_vit": (lambda: timm.create_model("test_vit", **timm_options, **vit), HALF, {}),
        "hf_vit": (lambda: ViTForImageClassification(ViTConfig(**hf)), HALF, {}),
        "lora_dropout": (lambda: ViTForImageClassification(ViTConfig(**hf)), HALF, {"lora_dropout": 0.3}),
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", _random_models())
def test_recomputation_draws_the_same_random_numbers(name, mode):
    build, preprocessing, config = _random_models()[name]
    torch.manual_seed(0)
    network = build()
    if config:
        targets = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and n != "classifier"]
        config = {**config, "target_modules": targets, "layout": "peft"}
    model = get_autolora_model(network, AutoLoraConfig(mode=mode, **config), preprocessing=preprocessing).double()
    change_everything(model)
    plain, other = copy.deepcopy(model.train()), copy.deepcopy(model)
    expected = step(plain)
    assert not torch.equal(*(objective(model) for _ in range(2))), "nothing is random"
    assert_same_step(step(checkpointed(other)), expected)


@pytest.mark.parametrize("name", SUPPORTED)
def test_autocast(name):
    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(model.float())
        loss.backward()
        return gradients(model), copied_state(model), torch.zeros(1)

    assert_same_step(run(checkpointed(changed_model(name))), run(changed_model(name)))


# ---- unusual ways through the graph ----


@pytest.mark.parametrize("name", [*SUPPORTED, "hf_swin"])
def test_a_graph_can_be_walked_again(name):
    expected = step(changed_model(name, layout="peft"))
    model = checkpointed(changed_model(name, layout="peft"))
    loss = objective(model)
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert_same_step((gradients(model), copied_state(model), expected[2]), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("outer", ["robust", "natural", "no adapters"])
def test_backward_inside_a_route(name, mode, outer):
    def run(model):
        loss = objective(model)
        with model.disable_adapter() if outer == "no adapters" else model.route(outer):
            inside = flags(model), layer_flags(model)
            loss.backward()
            assert (flags(model), layer_flags(model)) == inside
        return gradients(model), copied_state(model), torch.zeros(1)

    assert_same_step(run(checkpointed(changed_model(name, mode))), run(changed_model(name, mode)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("inside", [False, True])
def test_without_adapters(name, mode, inside):
    def run(model):
        images = pixels(4, 2, torch.float64).requires_grad_()
        with model.disable_adapter():
            loss = logits_of(model(images)).square().sum()
            if inside:
                before = layer_flags(model)
                loss.backward()
                assert layer_flags(model) == before
        if not inside:
            loss.backward()
        return {**gradients(model), "images": images.grad}, copied_state(model), torch.zeros(1)

    assert_same_step(run(checkpointed(changed_model(name, mode))), run(changed_model(name, mode)))


@pytest.mark.parametrize("name", [*SUPPORTED, "hf_swin"])
def test_backward_on_another_thread(name):
    """As on a GPU, for which autograd has threads of its own."""
    expected = step(changed_model(name, "adapter", "peft"))
    model = checkpointed(changed_model(name, "adapter", "peft"))
    loss = objective(model)
    errors = []

    def backward():
        try:
            loss.backward()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not errors
    assert_same_step((gradients(model), copied_state(model), expected[2]), expected)
    assert torch.utils.checkpoint.checkpoint is checkpoint


@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
def test_an_attack_on_the_model_itself(name):
    """timm checkpoints in eval mode too."""
    images, labels = pixels(4, 3, torch.float64), torch.tensor([0, 1, 2, 3])
    attack = PGD(steps=2)
    for route in ("robust", "natural"):
        model = changed_model(name)
        expected = attack(model.pixel_space(route), images, labels)
        state = copied_state(model)
        assert torch.equal(attack(checkpointed(model).pixel_space(route), images, labels), expected)
        assert same(copied_state(model), state)


@pytest.mark.filterwarnings("error:.*use_reentrant parameter")
@pytest.mark.parametrize("name", ["timm_vit", "hf_vit"])
def test_blocks_that_checkpoint_by_themselves(name):
    """Without saying which kind, which torch would take for the reentrant one."""

    def build():
        model = changed_model(name)
        for module in list(model.modules()):
            if type(module).__name__ in ("Mlp", "ViTMLP"):
                inner = module.forward
                module.forward = lambda x, inner=inner: torch.utils.checkpoint.checkpoint(inner, x)
                module.count = 1
        assert sum(getattr(module, "count", 0) for module in model.modules()) >= 2
        return model

    assert_same_step(step(checkpointed(build())), step(changed_model(name)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
def test_inside_distributed_data_parallel(tmp_path, name, mode):
    expected = step(changed_model(name, mode))
    model = checkpointed(changed_model(name, mode))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(model)
        call_inside(wrapper, model, lambda _: objective(model), pixels()).backward()
        assert_same_step((gradients(model), copied_state(model), expected[2]), expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
def test_copies_are_independent(name):
    model = checkpointed(changed_model(name))
    other = copy.deepcopy(model)
    change_everything(other, seed=8)
    plain = changed_model(name)
    change_everything(plain, seed=8)
    for one in (plain, other):
        one.zero_grad()
        one.train()
    expected = step(plain)
    del model
    assert_same_step(step(other), expected)


def test_a_context_of_ones_own():
    seen = []

    @contextmanager
    def note(name):
        seen.append(name)
        yield

    model = changed_model("hf_vit")
    model.activation_checkpointing_enable({"context_fn": lambda: (note("forward"), note("again"))})
    with model.route("natural"):
        loss = model(pixels(2, 0, torch.float64)).logits.sum()
    assert seen == ["forward"] * 2
    loss.backward()
    assert seen == ["forward"] * 2 + ["again"] * 2


# ---- no trace ----


def module_state(model):
    names = ("_gradient_checkpointing_func", "gradient_checkpointing", "grad_checkpointing")
    return {
        name: {key: value for key, value in vars(module).items() if key in names and value is not False}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", SUPPORTED)
def test_off_again(name):
    model = changed_model(name)
    before = module_state(model), flags(model), layer_flags(model)
    checkpointed(model)
    assert module_state(model) != before[0]
    objective(model).backward()
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    assert (module_state(model), flags(model), layer_flags(model)) == before


@pytest.mark.parametrize("name", SUPPORTED)
def test_old_names(name):
    model = changed_model(name)
    model.gradient_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert model.is_gradient_checkpointing
    assert_same_step(step(model), step(changed_model(name)))
    model.gradient_checkpointing_disable()
    assert not model.is_activation_checkpointing


class Failure(Exception):
    pass


@pytest.mark.parametrize("name", FIRST_LAYERS)
def test_errors_leave_no_trace(name):
    model = checkpointed(changed_model(name))

    def state():
        return flags(model), layer_flags(model), {name: id(buffer) for name, buffer in model.named_buffers()}

    before = state()

    def fail(*_):
        raise Failure

    layer = next(module for n, module in model.named_modules() if re.search(f"{FIRST_LAYERS[name]}$", n))
    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(Failure):
        objective(model)
    assert state() == before
    hook.remove()
    loss = objective(model)
    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(Failure):
        loss.backward()
    hook.remove()
    assert state() == before
    assert torch.utils.checkpoint.checkpoint is checkpoint
    assert checkpointing._RUNNING.get() is None


def test_others_code_is_left_alone():
    """What else checkpoints while a model runs does so as before."""
    model = checkpointed(changed_model("timm_resnet"))
    results = []

    def elsewhere():
        x = torch.ones(2, requires_grad=True)
        results.append(torch.utils.checkpoint.checkpoint(torch.exp, x, use_reentrant=True).sum())
        results[0].backward()
        results.append(x.grad)

    def hook(*_):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    handle = model.get_base_model().conv1.register_forward_pre_hook(hook)
    with model.route("robust"):
        model(pixels(2, 0, torch.float64))
    handle.remove()
    assert torch.equal(results[1], torch.ones(2).exp())


def test_a_frozen_route_does_not_checkpoint(monkeypatch):
    for name in SUPPORTED:
        model = checkpointed(changed_model(name))
        frozen = FrozenRoute(model)
        assert not checkpointing.is_enabled(frozen)
        assert model.is_activation_checkpointing
        images = pixels(2, 0, torch.float64).requires_grad_()
        with monkeypatch.context() as patch:
            patch.setattr(torch.utils.checkpoint, "checkpoint", None)
            (frozen(images).sum()).backward()
        assert images.grad.any()


# ---- refused ----


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, ["Reentrant", "use_reentrant=False"]),
        ({"activation_checkpointing_kwargs": {"preserve_rng_state": False}}, ["`preserve_rng_state=False`", "random"]),
        ({"activation_checkpointing_kwargs": {"use_rentrant": False}}, ["use_rentrant", "use_reentrant"]),
        ({"every_n_layers": 0}, ["`every_n_layers`", "got 0"]),
    ],
)
def test_bad_options(name, options, parts):
    model = MODELS[name].adapted()
    before = module_state(model)
    with pytest.raises(ValueError) as caught:
        model.activation_checkpointing_enable(**options)
    assert all(part in str(caught.value) for part in parts)
    assert module_state(model) == before


@pytest.mark.parametrize("options", [{"every_n_layers": 2}, {"offload": True}, {"determinism_check": "none"}])
def test_timm_takes_no_options(options):
    model = MODELS["timm_vit"].adapted()
    kwargs = {key: options.pop(key) for key in list(options) if key == "determinism_check"}
    with pytest.raises(ValueError, match="timm takes no options"):
        model.activation_checkpointing_enable(kwargs, **options)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert model.is_activation_checkpointing


@pytest.fixture
def timm_reentrant():
    """As the environment variable TIMM_REENTRANT_CKPT does."""
    timm.layers.set_reentrant_ckpt(True)
    yield
    timm.layers.set_reentrant_ckpt(False)


@pytest.mark.parametrize("name", ["timm_resnet", "timm_vit"])
def test_reentrant_timm(name, timm_reentrant):
    model = MODELS[name].adapted().train()
    with pytest.raises(ValueError, match=r"Reentrant.*TIMM_REENTRANT_CKPT"):
        model.activation_checkpointing_enable()
    assert not model.is_activation_checkpointing
    # Turned on in the network itself, it is found out in the first pass.
    model.get_base_model().set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="Reentrant"):
        model.pixel_space()(pixels())
    assert torch.utils.checkpoint.checkpoint is checkpoint


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_turned_on_in_the_transformers_model_itself(options):
    model = MODELS["hf_vit"].adapted().train()
    model.get_base_model().activation_checkpointing_enable(options)
    with pytest.raises(ValueError, match=r"turned on in the ViTForImageClassification itself"):
        model.pixel_space()(pixels())
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    model.pixel_space()(pixels())


def test_turned_on_in_the_timm_model_itself():
    expected = step(changed_model("timm_resnet"))
    model = changed_model("timm_resnet")
    model.get_base_model().set_grad_checkpointing(True)
    assert_same_step(step(model), expected)


def test_transformers_without_checkpointing():
    model = MODELS["hf_resnet"].adapted()
    with pytest.raises(ValueError, match=r"transformers has no activation checkpointing for ResNetForImage"):
        model.activation_checkpointing_enable()
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("architecture", ["convit_tiny", "inception_v3", "pit_ti_224", "vgg11"])
def test_timm_without_checkpointing(architecture):
    with torch.device("meta"):
        network = timm.create_model(architecture)
    with pytest.raises(ValueError, match=f"timm has no activation checkpointing for {type(network).__name__}"):
        checkpointing.enable(network)
    assert not checkpointing.is_enabled(network)


# ---- in the trainer ----


class Started(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise AssertionError("training has begun")


def test_refused_before_training(tmp_path):
    model = MODELS["hf_resnet"].adapted(num_classes=len(NAMES))
    args = arguments(tmp_path, activation_checkpointing=True)
    trainer = AutoLoraTrainer(model, args, train_dataset=pictures(), callbacks=[Started()])
    with pytest.raises(ValueError, match="no activation checkpointing for ResNetForImageClassification"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "Reentrant"),
        ({"activation_checkpointing_kwargs": '{"use_reentrant": true}'}, "Reentrant"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "Reentrant"),
        ({"activation_checkpointing_kwargs": {"every_n_layers": 0}}, "`every_n_layers`"),
        ({"activation_checkpointing_kwargs": {"every": 2}}, "every. Possible"),
        ({"activation_checkpointing": True, "torch_compile": True}, "`torch_compile` do not go together"),
        ({"fsdp_config": {"activation_checkpointing": True}}, "FSDP"),
    ],
)
def test_bad_arguments(tmp_path, changes, part):
    with pytest.raises(ValueError) as caught:
        arguments(tmp_path, **changes)
    assert part in str(caught.value)


@pytest.mark.parametrize(("name", "mode"), [("timm_resnet", "full"), ("timm_vit", "adapter"), ("hf_vit", "full")])
def test_a_run(tmp_path, monkeypatch, name, mode):
    # The measurement before the first step recomputes layers, too.
    monkeypatch.setattr(DiagnosisCallback, "_measure_start", lambda callback: None)

    def run(folder, **changes):
        model = MODELS[name].adapted(num_classes=len(NAMES), mode=mode)
        args = arguments(folder, num_train_epochs=1, per_device_train_batch_size=24, **changes)
        trainer = AutoLoraTrainer(model, args, train_dataset=pictures())
        with counted(model, FIRST_LAYERS[name]) as counts:
            trainer.train()
        assert trainer.state.global_step == 2
        trainer.save_model()
        return trainer, counts

    plain, calls = run(tmp_path / "plain")
    again, more_calls = run(tmp_path / "again", activation_checkpointing=True)
    assert again.model.is_activation_checkpointing
    assert not checkpointing.is_enabled(again._attacker.frozen)
    # Two steps of two routes, once more each.
    assert all(more_calls[layer] == count + 4 for layer, count in calls.items())
    assert same(copied_state(plain.model), copied_state(again.model))

    files = {file.name for file in (tmp_path / "plain").glob("*.*")}
    assert files == {file.name for file in (tmp_path / "again").glob("*.*")}
    for file in files - {"training_args.json", "training_plan.json"}:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    base = MODELS[name].fresh(num_classes=3) if mode == "adapter" else None
    loaded = load_autolora_model(tmp_path / "again", base_model=base)
    assert not loaded.is_activation_checkpointing
    assert same(copied_state(loaded), copied_state(plain.model))


def test_memory():
    """Far fewer values wait for the backward pass."""

    def kept(model):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        alive = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = objective(model)
        del loss
        return sum(size for pointer, size in sizes.items() if pointer not in alive)

    for name in FIRST_LAYERS:
        plain, saving = kept(changed_model(name)), kept(checkpointed(changed_model(name)))
        assert saving < 0.7 * plain, name
