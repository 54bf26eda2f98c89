"""Extraction: what the adapter of a weight change keeps, how large it is, and what is refused."""

import copy
import json
import logging

import pytest
import timm
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import IMAGENET, MODELS, change_everything, pixels
from torch import nn
from torch.utils.data import TensorDataset

from autolora_hf import (
    PGD,
    AutoLoraTrainer,
    AutoLoraTrainingArguments,
    Preprocessing,
    ThreatModel,
    get_autolora_model,
    load_autolora_model,
)
from autolora_hf.hub import extraction
from autolora_hf.hub.extraction import extract_adapter, extract_for_accuracy
from autolora_hf.hub.norm_statistics import recalibrate
from autolora_hf.hub.weight_change import decompose, greedy_ranks
from autolora_hf.pixels import Normalize


ATTACK = PGD(ThreatModel(), steps=2)


def trained(name="timm_resnet", norm="shared", dtype=torch.float32):
    """A full model whose every weight and statistic has moved, and the backbone it started from."""
    base = MODELS[name].fresh().to(dtype)
    model = MODELS[name].adapted(mode="full", norm=norm).to(dtype)
    change_everything(model)
    return model, base


def logits(model, route="robust", dtype=torch.float32):
    with torch.no_grad():
        return model.pixel_space(route)(pixels(dtype=dtype))


def freeze_left_out(model, base):
    """Takes back what no adapter carries: biases of layers with a branch, tokens and embeddings."""
    for key in extract_adapter(model, base, rank=1).left_out:
        with torch.no_grad():
            model.get_base_model().get_parameter(key).copy_(base.get_parameter(key))


def dataset(count=40, classes=4, seed=3):
    labels = torch.arange(count) % classes
    return TensorDataset(pixels(count, seed), labels)


def state(module):
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# ---- what is kept ----


@pytest.mark.parametrize("norm", ["shared", "dual"])
@pytest.mark.parametrize("name", ["timm_resnet", "hf_resnet"])
def test_the_full_rank_gives_the_robust_route_again(name, norm):
    model, base = trained(name, norm, torch.float64)
    result = extract_adapter(model, base, rank=10_000)
    expected = logits(model, dtype=torch.float64)
    assert result.left_out == {}
    assert result.total_explained == pytest.approx(1)
    assert result.model.autolora_config.mode == "adapter"
    assert {layer.scaling["robust"] for layer in result.model.lora_layers().values()} == {1.0}
    for route in ("robust", "natural"):
        assert torch.allclose(logits(result.model, route, torch.float64), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["timm_vit", "hf_vit"])
def test_layer_norms_are_carried_whole_and_what_is_lost_is_named(name, caplog):
    model, base = trained(name, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        result = extract_adapter(model, base, rank=10_000)
    assert any(key.endswith("bias") for key in result.left_out)
    assert any("embed" in key or "cls_token" in key for key in result.left_out)
    assert all(0 < change <= 2 for change in result.left_out.values())
    assert "no adapter carries" in caplog.text and max(result.left_out, key=result.left_out.get) in caplog.text
    freeze_left_out(model, base)
    caplog.clear()
    result = extract_adapter(model, base, rank=10_000)
    assert result.left_out == {} and "no adapter carries" not in caplog.text
    found, expected = logits(result.model, dtype=torch.float64), logits(model, dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_what_the_model_is_for_is_taken_over():
    model, base = trained()
    model.threat_model, model.label_names = ThreatModel("l2", 0.5), ["a", "b", "c", "d"]
    result = extract_adapter(model, base, size=0.5).model
    assert result.threat_model == model.threat_model and result.label_names == model.label_names
    assert result.preprocessing == model.preprocessing
    assert result.backbone["architecture"] == model.backbone["architecture"]


@pytest.mark.parametrize("rank", [1, 3])
def test_one_layer_is_cut_as_well_as_any_matrix_of_that_rank(rank):
    model, base = trained(dtype=torch.float64)
    result = extract_adapter(model, base, rank=rank)
    for name, layer in result.model.lora_layers().items():
        old, new = (network.get_submodule(name) for network in (base, model.get_base_model()))
        new = new.get_base_layer() if hasattr(new, "get_base_layer") else new
        change = (new.weight - old.weight).detach().flatten(1)
        rest = torch.linalg.svdvals(change)[rank:]
        error = (change - layer.get_delta_weight("robust").detach().flatten(1)).norm()
        assert error == pytest.approx(rest.norm().item(), rel=1e-9, abs=1e-12)
        share = 1 - float(rest.norm() / change.norm()) ** 2
        assert result.explained[name] == pytest.approx(share)


def test_the_stem_gets_a_branch_though_other_names_end_like_it(tmp_path):
    base = timm.create_model("resnet10t", num_classes=3, stem_width=4, channels=(8, 8, 8, 8), stem_type="")
    preprocessing = Preprocessing((32, 32), crop_pct=1.0)
    model = get_autolora_model(copy.deepcopy(base).eval(), preprocessing=preprocessing)
    with torch.no_grad():
        model.get_base_model().conv1.weight += 0.1
    result = extract_adapter(model, base.eval(), rank=2)
    assert list(result.ranks) == ["conv1"] and list(result.model.lora_layers()) == ["conv1"]
    result.model.save_pretrained(tmp_path)
    assert torch.equal(logits(load_autolora_model(tmp_path, base_model=base)), logits(result.model))


# ---- size ----


@pytest.mark.parametrize("size", [0.2, 0.35, 0.7])
def test_the_saved_values_are_within_the_size(tmp_path, size):
    model, base = trained()
    result = extract_adapter(model, base, size=size)
    result.model.save_pretrained(tmp_path)
    saved = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    full = sum(tensor.numel() for tensor in base.state_dict().values())
    assert saved == result.values <= size * full and full == result.full_values
    # Nothing that would still fit is left.
    spare = int(size * full) - saved
    for name, layer in result.model.lora_layers().items():
        weight = layer.get_base_layer().weight
        cost, rank = weight.shape[0] + weight[0].numel(), result.ranks[name]
        assert cost > spare or rank == min(weight.shape[0], weight[0].numel())


def test_a_larger_size_never_explains_less():
    model, base = trained()
    shares = [extract_adapter(model, base, size=size).total_explained for size in (0.12, 0.15, 0.2, 0.21, 0.3, 0.5)]
    assert shares == sorted(shares)


def test_greedy_ranks_of_random_spectra_are_monotone_and_affordable():
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for index, (rows, columns) in enumerate([(4, 9), (7, 30), (16, 16), (3, 50)]):
        new = torch.randn(rows, columns, generator=generator)
        layers[str(index)] = decompose(torch.zeros_like(new), new, stock=True)
    best = 0.0
    for budget in range(0, 900, 7):
        ranks = greedy_ranks(layers, budget)
        assert sum(layers[name].cost * rank for name, rank in ranks.items()) <= budget
        explained = sum(float(layers[name].sigma[:rank].square().sum()) for name, rank in ranks.items())
        assert explained >= best - 1e-9
        best = explained


def test_the_smallest_size_in_the_message_works():
    model, base = trained()
    with pytest.raises(ValueError, match="head and norms alone have") as error:
        extract_adapter(model, base, size=0.001)
    smallest = float(str(error.value).split()[-1].rstrip("."))
    assert sum(extract_adapter(model, base, size=smallest).ranks.values()) == 1


# ---- determinism, the caller's objects ----


def test_equal_calls_give_equal_adapters_and_change_nothing():
    model, base = trained()
    before, base_before, modes = state(model), state(base), [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    first = extract_adapter(model, base, size=0.3, calibration=dataset())
    assert torch.equal(torch.get_rng_state(), generator)
    torch.rand(3)
    second = extract_adapter(model, base, size=0.3, calibration=dataset())
    assert same(state(first.model), state(second.model)) and first.to_dict() == second.to_dict()
    assert same(state(model), before) and same(state(base), base_before)
    assert modes == [module.training for module in model.modules()]


def test_signs_do_not_depend_on_the_library():
    new = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    layer = decompose(torch.zeros(5, 8), new, stock=True)
    largest = layer.left.gather(0, layer.left.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()
    assert torch.allclose(layer.left * layer.sigma @ layer.right, new.double())


# ---- files ----


@pytest.mark.parametrize("name", ["timm_resnet", "hf_resnet", "timm_vit", "hf_vit"])
def test_stock_peft_loads_it(tmp_path, name):
    model, base = trained(name)
    result = extract_adapter(model, base, size=0.4, stock_peft=True)
    result.model.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    images = Normalize(MODELS[name].preprocessing)(pixels())
    with torch.no_grad():
        output = stock(images)
    found = output if isinstance(output, torch.Tensor) else output.logits
    assert torch.allclose(found, logits(result.model), atol=1e-5)
    again = load_autolora_model(tmp_path, base_model=copy.deepcopy(base))
    assert torch.equal(logits(again), logits(result.model))
    record = again.training_plan["extraction"]
    assert record["ranks"] == result.ranks and record["values"] == result.values
    assert record == json.loads(json.dumps(result.to_dict()))


def test_the_base_is_found_by_its_name(tmp_path):
    base = MODELS["timm_resnet"].fresh()
    start = get_autolora_model(base, preprocessing=IMAGENET)
    start.save_pretrained(tmp_path / "base")
    folder = str(tmp_path / "base")
    model = get_autolora_model(folder, num_classes=6, preprocessing=IMAGENET)
    change_everything(model)
    result = extract_adapter(model, size=0.5)
    assert result.model.backbone["name_or_path"] == folder
    assert torch.equal(logits(result.model), logits(extract_adapter(model, folder, size=0.5).model))
    result.model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load_autolora_model(tmp_path / "adapter")), logits(result.model))


# ---- layers that stock PEFT lacks ----


@pytest.mark.parametrize("share", ["little", "much"])
def test_layers_without_an_exact_peft_layer(share, caplog):
    base = timm.create_model("test_efficientnet", num_classes=3).eval()
    model = get_autolora_model(copy.deepcopy(base), preprocessing=Preprocessing((32, 32), crop_pct=1.0))
    network, seen = model.get_base_model(), set()
    with torch.no_grad():
        for module in list(network.modules()):
            module = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            if isinstance(module, nn.Conv2d) and module not in seen:
                seen.add(module)
                depthwise = module.groups > 1
                module.weight += (0.001 if depthwise and share == "little" else 0.1) * torch.randn_like(module.weight)
    with caplog.at_level(logging.WARNING):
        result = extract_adapter(model, base, rank=2)
    has_grouped = any(layer.get_base_layer().groups > 1 for layer in result.model.lora_layers().values())
    assert has_grouped == (share == "much") == ("stock PEFT has no exact LoRA layer" in caplog.text)
    forced = extract_adapter(model, base, rank=2, stock_peft=True)
    assert all(layer.get_base_layer().groups == 1 for layer in forced.model.lora_layers().values())
    assert forced.total_explained <= result.total_explained + 1e-9


# ---- running statistics ----


def test_statistics_are_those_of_the_adversarial_images():
    model, base = trained()
    plain = extract_adapter(model, base, size=0.3)
    result = extract_adapter(model, base, size=0.3, calibration=dataset())
    assert (plain.calibration_images, result.calibration_images) == (0, 40)
    first, second = state(plain.model), state(result.model)
    changed = {key for key in first if not torch.equal(first[key], second[key])}
    assert changed and all("running_" in key or "num_batches" in key for key in changed)
    assert not any("original_module" in key for key in changed)

    # One batch: a norm then has the statistics that it normalises that batch with.
    view = result.model.pixel_space()
    images = PGD(model.threat_model)(
        model.pixel_space(), *(torch.stack(list(x)) for x in zip(*dataset(), strict=True))
    )
    before = view(images)
    for module in result.model.modules():
        module.training = isinstance(module, nn.BatchNorm2d)
    with torch.no_grad():
        batch = view(images)
    assert torch.allclose(before, batch, atol=0.05 * batch.abs().max().item())


def test_recalibration_in_place_leaves_modes_and_weights_alone():
    model, _ = trained(norm="dual")
    weights, modes = [p.clone() for p in model.parameters()], [module.training for module in model.modules()]
    momenta = [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert recalibrate(model, dataset(), attack=ATTACK) == 40
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))
    assert modes == [module.training for module in model.modules()]
    assert momenta == [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_a_model_without_statistics_has_none_to_estimate():
    model, _ = trained("timm_vit")
    before = state(model)
    assert recalibrate(model, dataset(), attack=ATTACK) == 0
    assert same(state(model), before)


# ---- a budget of accuracy ----


@pytest.fixture
def measured(monkeypatch):
    """Robust accuracy as a function of size alone, so that the answer of the search is known."""
    calls = []

    def evaluate(network, data, threat_model, attack, **kwargs):
        values = None
        if isinstance(network, extraction.AutoLoraModel):
            full = network.autolora_config.mode == "full"
            values = None if full else extraction._stored_values(network)
        robust = 80 if values is None and isinstance(network, extraction.AutoLoraModel) else 10
        if values is not None:
            robust = min(80, 10 + values // 400)
        calls.append(values)
        accuracy = extraction.Accuracy.from_counts
        return type("Report", (), {"natural": accuracy(90, 100), "robust": accuracy(robust, 100)})()

    monkeypatch.setattr(extraction, "evaluate_robustness", evaluate)
    return calls


def test_the_smallest_size_for_an_accuracy(measured):
    model, base = trained()
    full = sum(tensor.numel() for tensor in base.state_dict().values())
    needed = 400 * 63  # values for 73 %, which is 90 % of the way from 10 to 80
    result = extract_for_accuracy(model, base, dataset(), keep=0.9, max_size=0.9)
    assert needed <= result.values < 1.15 * needed
    assert [point.values for point in result.points] == sorted(point.values for point in result.points)
    assert (result.points[0].values, result.points[-1].values) == (0, full)
    assert len(result.points) == len(measured) < 12
    assert json.loads(json.dumps(result.to_dict()))["points"][0]["robust"]["value"] == 0.1


def test_an_accuracy_out_of_reach(measured):
    model, base = trained()
    with pytest.raises(ValueError, match=r"less than the 90% asked for.*`calibration`"):
        extract_for_accuracy(model, base, dataset(), max_size=0.05)


@pytest.mark.slow
def test_a_measured_search():
    model, base = trained()
    model.threat_model = ThreatModel("linf", 0.002)
    images = pixels(60, seed=5)
    with torch.no_grad():
        labels = model.pixel_space()(images).argmax(1)
    data = TensorDataset(images, labels)
    attack = PGD(model.threat_model, steps=2)
    result = extract_for_accuracy(model, base, data, keep=0.5, max_size=0.95, precision=0.8, attack=attack)
    base_point, full_point = result.points[0], result.points[-1]
    own = next(point for point in result.points if point.values == result.values)
    gain = full_point.robust.value - base_point.robust.value
    assert own.robust.value >= base_point.robust.value + 0.5 * gain
    report = result.measure(data, attack, progress=False)
    assert report.robust == own.robust and len(result.model.results) == 1


# ---- repair ----


def test_a_training_can_follow(tmp_path):
    model, base = trained()
    result = extract_adapter(model, base, size=0.3)
    before = state(result.model)
    args = AutoLoraTrainingArguments(
        str(tmp_path),
        eps=0.05,
        attack_steps=1,
        eval_attack_steps=1,
        num_train_epochs=1,
        learning_rate=5e-4,
        per_device_train_batch_size=20,
        validation_fraction=0.2,
    )
    trainer = AutoLoraTrainer(result.model, args, train_dataset=dataset())
    trainer.train()
    after = state(result.model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert any("lora_A.robust" in key for key in changed) and any("running_mean" in key for key in changed)
    assert not any("base_layer" in key or "original_module" in key for key in changed)


# ---- what is refused ----


def test_refusals():
    model, base = trained()
    adapter = MODELS["timm_resnet"].adapted(mode="adapter")
    for arguments in ({}, {"size": 0.1, "rank": 2}):
        with pytest.raises(ValueError, match="either `size` or `rank`"):
            extract_adapter(model, base, **arguments)
    for size in (0, 1, 1.5, -0.1, True, "0.1", float("nan")):
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            extract_adapter(model, base, size=size)
    for rank in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="`rank` must be an integer"):
            extract_adapter(model, base, rank=rank)
    with pytest.raises(ValueError, match="mode 'adapter'"):
        extract_adapter(adapter, base, size=0.1)
    with pytest.raises(TypeError, match="AutoLoraModel"):
        extract_adapter(base, base, size=0.1)
    with pytest.raises(ValueError, match="pass it, as it was before training"):
        extract_adapter(model, size=0.1)
    with pytest.raises(ValueError, match="another architecture"):
        extract_adapter(model, MODELS["timm_vit"].fresh(), size=0.1)
    with pytest.raises(ValueError, match="4 classes but the base model has 5"):
        extract_adapter(model, MODELS["timm_resnet"].fresh(5), size=0.1)
    with pytest.raises(ValueError, match="precision"):
        extract_adapter(model, copy.deepcopy(base).double(), size=0.1)
    untrained = MODELS["timm_resnet"].adapted(mode="full")
    with pytest.raises(ValueError, match="No layer that could carry a branch differs"):
        extract_adapter(untrained, base, size=0.5)


def test_no_gain_and_bad_shares():
    model, base = trained()
    images = pixels(40, seed=5)
    with torch.no_grad():
        labels = model.pixel_space()(images).argmin(1)
    with pytest.raises(ValueError, match="gained no robust accuracy"):
        extract_for_accuracy(model, base, TensorDataset(images, labels), attack=ATTACK)
    with pytest.raises(ValueError, match="`keep` is a share"):
        extract_for_accuracy(model, base, dataset(), keep=1.0)


def test_test_data_is_refused():
    datasets = pytest.importorskip("datasets")
    model, base = trained()
    images = [(255 * image.permute(1, 2, 0)).byte().numpy() for image in pixels(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
    test = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 2, 3]}, features=features, split="test")
    with pytest.raises(ValueError, match="`validation` is the 'test' split"):
        extract_for_accuracy(model, base, test)
    with pytest.raises(ValueError, match="`calibration` is the 'test' split"):
        extract_adapter(model, base, size=0.5, calibration=test)
    data = dataset()
    with pytest.raises(ValueError, match="`calibration` shares images with `validation`"):
        extract_for_accuracy(model, base, data, calibration=data)
