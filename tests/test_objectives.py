"""The defining property of every objective: its formula, what trains, what gradient goes where."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import MODELS, pixels

from autolora_hf import AutoLoraConfig, config_for, get_autolora_model
from autolora_hf.objectives import OBJECTIVES, AutoLora, Batch, Mart, Trades, TwinsAT, TwinsTrades
from autolora_hf.objectives.ar_at import PREDICTORS, AsymmetricRegularization, predictor
from autolora_hf.objectives.features import FeatureReader
from autolora_hf.objectives.mart import boosted_cross_entropies
from autolora_hf.objectives.terms import kl_divergences
from autolora_hf.routes import NATURAL, ROBUST
from autolora_hf.schedules import LossScalars
from autolora_hf.training.forward import TrainingForward


SCALARS = LossScalars(0.3, 4.0)
N, K = 6, 4


class Logits:
    """A forward that only knows tables: logits by route and by whether the images are the adversarial ones."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tables = {
            (route, kind): torch.randn(N, K, dtype=torch.float64, generator=generator).requires_grad_()
            for route in (ROBUST, NATURAL)
            for kind in ("clean", "adversarial")
        }
        self.calls = []

    def __call__(self, route, images):
        kind = "clean" if images[0, 0, 0, 0] < 0.5 else "adversarial"
        rows = images[:, 0, 0, 1].long()
        self.calls.append((route, kind, rows.tolist()))
        return self.tables[route, kind][rows]


def batch(labels=None):
    clean = torch.zeros(N, 3, 2, 2, dtype=torch.float64)
    clean[:, 0, 0, 1] = torch.arange(N)
    adversarial = clean.clone()
    adversarial[:, 0, 0, 0] = 1
    return Batch(clean, adversarial, torch.arange(N) % K if labels is None else labels)


def softmax_kl(target, logits):
    p, q = target.softmax(1), logits.softmax(1)
    return (p * (p.log() - q.log())).sum(1)


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


# ---- formulas ----


def test_pgd_at_is_the_cross_entropy_of_adversarial_images():
    forward, data = Logits(), batch()
    loss = OBJECTIVES["pgd-at"]()(forward, data, SCALARS).loss
    assert close(loss, F.cross_entropy(forward.tables[ROBUST, "adversarial"], data.labels))
    assert forward.calls == [(ROBUST, "adversarial", list(range(N)))]


def test_natural_objectives_see_clean_images_alone():
    for name in ("natural", "slf"):
        forward, data = Logits(), batch()
        loss = OBJECTIVES[name]()(forward, Batch(data.pixels, None, data.labels), SCALARS).loss
        assert close(loss, F.cross_entropy(forward.tables[ROBUST, "clean"], data.labels))


@pytest.mark.parametrize("beta", [0.0, 6.0])
def test_trades(beta):
    forward, data = Logits(), batch()
    clean, adversarial = forward.tables[ROBUST, "clean"], forward.tables[ROBUST, "adversarial"]
    loss = Trades(beta=beta)(forward, data, SCALARS).loss
    assert close(loss, F.cross_entropy(clean, data.labels) + beta * softmax_kl(clean, adversarial).mean())
    assert {route for route, *_ in forward.calls} == {ROBUST}


def test_trades_with_automatic_scalars_is_autolora_through_one_route():
    objective, data = Trades(automatic=True), batch()
    assert objective.uses_scalars and not Trades().uses_scalars
    forward = Logits()
    forward.tables[NATURAL, "clean"] = forward.tables[ROBUST, "clean"]
    assert close(objective(forward, data, SCALARS).loss, AutoLora()(forward, data, SCALARS).loss)


def test_mart():
    forward, data = Logits(), batch()
    clean, adversarial = forward.tables[ROBUST, "clean"], forward.tables[ROBUST, "adversarial"]
    p, rows = adversarial.softmax(1), torch.arange(N)
    others = p.clone()
    others[rows, data.labels] = 0
    bce = -p[rows, data.labels].log() - (1 - others.max(1).values).log()
    doubt = 1 - clean.softmax(1)[rows, data.labels]
    expected = bce.mean() + 5 * (softmax_kl(clean, adversarial) * doubt).mean()
    assert close(Mart()(forward, data, SCALARS).loss, expected)


def test_marts_boosted_cross_entropy_stays_finite_where_it_is_certain():
    logits = torch.tensor([[200.0, 0.0, -200.0], [-200.0, 200.0, 0.0]], requires_grad=True)
    found = boosted_cross_entropies(logits, torch.tensor([0, 0]))
    assert found[0] < 1e-6 and found[1] > 300 and found.isfinite().all()
    found.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_twins_at_splits_the_batch_between_its_two_nets(weight):
    forward, data, half = Logits(), batch(), N // 2
    loss = TwinsAT(weight=weight)(forward, data, SCALARS).loss
    frozen = F.cross_entropy(forward.tables[NATURAL, "adversarial"][:half], data.labels[:half])
    adaptive = F.cross_entropy(forward.tables[ROBUST, "adversarial"][half:], data.labels[half:])
    assert close(loss, weight * frozen + adaptive)
    assert forward.calls == [
        (NATURAL, "adversarial", list(range(half))),
        (ROBUST, "adversarial", list(range(half, N))),
    ]


def test_twins_trades_divides_the_divergence_by_the_whole_batch():
    forward, data, half = Logits(), batch(), N // 2
    loss, expected = TwinsTrades(weight=0.4)(forward, data, SCALARS).loss, 0
    for weight, route, part in ((0.4, NATURAL, slice(0, half)), (1, ROBUST, slice(half, N))):
        clean, adversarial = (forward.tables[route, kind][part] for kind in ("clean", "adversarial"))
        kl = softmax_kl(clean, adversarial).sum() / N
        expected = expected + weight * (F.cross_entropy(clean, data.labels[part]) + 6 * kl)
    assert close(loss, expected)


def test_twins_with_a_single_image():
    forward, one = Logits(), batch()
    one = Batch(one.pixels[:1], one.adversarial[:1], one.labels[:1])
    assert TwinsAT()(forward, one, SCALARS).loss.isfinite()
    assert [route for route, *_ in forward.calls] == [NATURAL, ROBUST]


def test_images_beyond_its_own_share_do_not_count_for_twins():
    """A process may get images of others after its own, which only fill the batch up."""
    forward, data = Logits(), batch()
    loss = TwinsAT()(forward, Batch(data.pixels, data.adversarial, data.labels[:4]), SCALARS).loss
    frozen = F.cross_entropy(forward.tables[NATURAL, "adversarial"][:2], data.labels[:2])
    adaptive = F.cross_entropy(forward.tables[ROBUST, "adversarial"][2:4], data.labels[2:4])
    assert close(loss, 0.3 * frozen + adaptive)


def test_the_shared_divergence_has_its_target_first_and_undetached():
    target, logits = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = kl_divergences(target, logits)
    assert close(found, softmax_kl(target, logits))
    found.sum().backward()
    assert target.grad.abs().sum() > 0


@pytest.mark.parametrize("detach", [False, True])
def test_a_detached_target_keeps_the_divergence_from_the_natural_branch(detach):
    model = MODELS["timm_resnet"].adapted()
    objective = AutoLora(detach_target=detach)
    only_kl = LossScalars(0.0, 6.0)  # the natural cross-entropy has no weight
    with torch.no_grad():
        for parameter in model._branch_parameters(NATURAL):
            parameter += 0.05
    loss_of(objective, model, only_kl).backward()
    reached = any(p.grad is not None and p.grad.abs().sum() > 0 for p in model._branch_parameters(NATURAL))
    assert reached is not detach


# ---- on real models ----


def model_for(objective, name="timm_resnet", **changes):
    tiny = MODELS[name]
    torch.manual_seed(0)
    network = tiny.fresh()
    return get_autolora_model(network, config_for(objective, network, **changes), preprocessing=tiny.preprocessing)


def loss_of(objective, model, scalars=SCALARS, train=True, count=8):
    model.train(train)
    clean = pixels(count, dtype=next(model.parameters()).dtype)
    noise = 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).to(clean)
    data = Batch(clean, (clean + noise).clamp(0, 1), torch.arange(count) % 4)
    normalize = model.pixel_space(ROBUST).normalize
    return objective(TrainingForward(model, normalize, torch.float32, count), data, scalars).loss


@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
def test_no_gradient_reaches_the_clean_features_through_the_cosine(name):
    model = model_for("ar-at", name).double()
    objective = AsymmetricRegularization()
    objective.prepare(model, seed=0)
    seen = []

    class Watched(TrainingForward):
        def with_features(self, route, images, layers=()):
            logits, features = super().with_features(route, images, layers)
            for feature in features:
                feature.retain_grad()
                seen.append((route, feature))
            return logits, features

    clean = pixels(8, dtype=torch.float64)
    data = Batch(clean, (clean + 0.05).clamp(0, 1), torch.arange(8) % 4)
    model.train()
    forward = Watched(model, model.pixel_space(ROBUST).normalize, torch.float64, 8)
    output = objective(forward, data, LossScalars(0.0, 0.0))  # of the cross-entropies only the adversarial one
    output.loss.backward()
    gradients = dict(seen)
    assert gradients[NATURAL].grad is None or not gradients[NATURAL].grad.any()
    assert gradients[ROBUST].grad.abs().sum() > 0
    for norm in model.natural_norms.values():
        assert all(p.grad is None or not p.grad.any() for p in norm.parameters())


def test_that_test_would_notice_a_missing_stop_gradient(monkeypatch):
    model = model_for("ar-at")
    objective = AsymmetricRegularization()
    objective.prepare(model, seed=0)
    plain = lambda head, clean, robust: (1 - F.cosine_similarity(head(robust), clean, dim=1)).mean()  # noqa: E731
    monkeypatch.setattr(AsymmetricRegularization, "_distance", staticmethod(plain))
    loss_of(objective, model, LossScalars(0.0, 0.0)).backward()
    assert any(p.grad.abs().sum() > 0 for norm in model.natural_norms.values() for p in norm.parameters())


@pytest.mark.parametrize("layers", [None, ["layer4.0.bn1", "layer4.0.bn2"]])
def test_the_loss_of_ar_at_is_its_formula(layers):
    model = model_for("ar-at").double()
    names = dict(model.get_base_model().named_modules())
    if layers is not None and not set(layers) <= names.keys():
        layers = [name for name in names if name.endswith("bn2")][-2:]
    objective = AsymmetricRegularization(gamma=7, layers=layers)
    objective.prepare(model, seed=3)
    found = loss_of(objective, model, LossScalars(0.25, 9.9), train=False)

    clean = pixels(8, dtype=torch.float64)
    noise = 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)).double()
    labels, parts = torch.arange(8) % 4, {}
    for route, images in ((NATURAL, clean), (ROBUST, (clean + noise).clamp(0, 1))):
        with model.route(route), FeatureReader(model, layers or ()) as reader:
            logits = model(model.pixel_space(ROBUST).normalize(images))
            parts[route] = logits, reader.features()
    predictors = model.auxiliary[PREDICTORS].train()
    distances = [
        (1 - F.cosine_similarity(head(robust), feature, dim=1)).mean()
        for head, feature, robust in zip(predictors, parts[NATURAL][1], parts[ROBUST][1], strict=True)
    ]
    expected = 0.75 * F.cross_entropy(parts[ROBUST][0], labels) + 0.25 * F.cross_entropy(parts[NATURAL][0], labels)
    assert len(distances) == len(layers or [0])
    assert torch.allclose(found, expected + 7 * sum(distances) / len(distances), rtol=1e-10)


def test_features_of_a_map_are_rectified_norms_in_the_mean_over_places():
    model = model_for("ar-at")
    name = [key for key in dict(model.get_base_model().named_modules()) if key.endswith("bn2")][-1]
    kept = []
    hook = model.get_base_model().get_submodule(name).register_forward_hook(lambda *args: kept.append(args[2].clone()))
    with FeatureReader(model, [name]) as reader, torch.no_grad():
        model(pixels(2))
    hook.remove()
    assert torch.equal(reader.features()[0], kept[0].relu().mean((2, 3)))
    with pytest.raises(ValueError, match="layer9, which ResNet does not have"):
        FeatureReader(model, ["layer9"])


@pytest.mark.parametrize("width, count", [(512, 131_840), (8, 44)])
def test_the_size_of_a_predictor(width, count):
    assert sum(p.numel() for p in predictor(width).parameters()) == count == width**2 // 2 + 3 * width // 2


def test_the_weights_of_ar_at_are_autoloras_first_scalar():
    model, objective = model_for("ar-at"), AsymmetricRegularization(gamma=0)
    objective.prepare(model, seed=0)
    loss_of(objective, model, LossScalars(1.0, 0.0)).backward()  # accuracy 0: clean images alone
    norms = [p for norm in model.natural_norms.values() for p in norm.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in norms[:2])
    own = [module for name, module in model.get_base_model().named_modules() if name.endswith("bn1")]
    assert all(p.grad is None or not p.grad.any() for norm in own for p in norm.parameters())


@pytest.mark.parametrize("name", ["timm_resnet", "hf_vit"])
@pytest.mark.parametrize("stop", [True, False])
def test_lora_without_a_stop_gradient_trains_the_backbone_on_clean_images_too(name, stop):
    model = MODELS[name].adapted(stop_gradient=stop)
    loss_of(AutoLora(), model, LossScalars(1.0, 0.0)).backward()  # the natural cross-entropy alone
    heads = {id(p) for head in model.heads for p in head.parameters()}
    branch = {id(p) for p in model._branch_parameters(NATURAL)}
    backbone = [p for p in model.parameters() if id(p) not in heads | branch]
    reached = sum(p.grad.abs().sum().item() for p in backbone if p.grad is not None)
    assert (reached == 0) is stop


# ---- which models they fit ----


@pytest.mark.parametrize("objective", [name for name, kind in OBJECTIVES.items() if kind.classifies])
@pytest.mark.parametrize("mode", ["full", "adapter"])
def test_config_for_makes_a_model_that_fits(objective, mode):
    model = model_for(objective, mode=mode)
    OBJECTIVES[objective]().prepare(model, seed=0)
    assert set(OBJECTIVES[objective].routes) <= set(model.routes)
    assert (NATURAL in model.routes) == (NATURAL in OBJECTIVES[objective].routes), "a route that nobody needs"


@pytest.mark.parametrize("objective", ["autolora", "ar-at", "twins-at"])
def test_a_missing_route_is_told_with_what_to_pass(objective):
    model = MODELS["timm_resnet"].adapted(natural_route="none")
    with pytest.raises(ValueError, match=r"has no natural one.*leave out --norm.*config_for"):
        OBJECTIVES[objective]().prepare(model, seed=0)


@pytest.mark.parametrize("config", [{}, {"natural_route": "plain"}, {"stop_gradient": False, "norm": "split"}])
def test_ar_at_wants_norms_for_clean_images_and_their_gradient(config):
    with pytest.raises(ValueError, match=r"AR-AT needs `natural_route='plain'`.*this model has"):
        AsymmetricRegularization().prepare(MODELS["timm_resnet"].adapted(**config), seed=0)


def test_twins_wants_the_frozen_norms():
    with pytest.raises(ValueError, match=r"norm='frozen'.*has 'shared'.*config_for\(objective, backbone\)"):
        TwinsAT().prepare(MODELS["timm_resnet"].adapted(), seed=0)
    with pytest.raises(ValueError, match="running statistics of BatchNorm, and this model has none"):
        model_for("twins-at", "hf_vit")


def test_without_running_statistics_ar_at_keeps_one_set_of_norms():
    assert config_for("ar-at", MODELS["hf_vit"].fresh()).norm == "shared"
    assert config_for("ar-at", MODELS["timm_resnet"].fresh()).norm == "split"
    with pytest.raises(ValueError, match="running statistics"):
        model_for("ar-at", "hf_vit", norm="split")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"natural_route": "none", "norm": "dual"}, "natural_route='none'"),
        ({"natural_route": "plain", "target_modules": ["fc1"]}, "there is none"),
        ({"natural_route": "none", "stop_gradient": False}, "leaves it out"),
        ({"natural_route": "none", "branch": "loha"}, "there is no branch"),
        ({"natural_route": "both"}, "must be one of 'branch', 'plain', 'none'"),
        ({"norm": "frozen2"}, "`norm` must be one of"),
    ],
)
def test_contradictions_in_a_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        AutoLoraConfig(**fields)


def test_unknown_objective():
    with pytest.raises(ValueError, match=r"`objective` must be one of autolora, .*got 'twins'"):
        config_for("twins")


@pytest.mark.parametrize(
    "kind, options",
    [
        (Trades, {"beta": -1}),
        (Trades, {"beta": math.nan}),
        (Trades, {"attack_loss": "dlr"}),
        (Mart, {"weight": -1}),
        (TwinsAT, {"weight": -0.1}),
        (TwinsTrades, {"beta": -6}),
        (AsymmetricRegularization, {"gamma": -1}),
    ],
)
def test_options_out_of_range(kind, options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` must"):
        kind(**options)
