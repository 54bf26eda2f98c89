"""Transfer attacks: they search on the source, state what they do, and leave no trace."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import MODELS
from torch import nn

from autolora_hf import PGD, ThreatModel, TransferAttack, evaluate_robustness
from autolora_hf.evaluation.attack_list import attack_name, attack_settings


THREAT = ThreatModel("linf", 8 / 255)


def images(count=16, size=8, classes=3):
    random = torch.Generator().manual_seed(1)
    pixels = torch.rand(count, 3, size, size, generator=random)
    return pixels, torch.arange(count) % classes


class Linear(nn.Module):
    """A linear model with dropout, which changes the answers in training mode."""

    def __init__(self, seed=0, classes=3, size=8):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.dropout = nn.Dropout(0.5)
        self.layer = nn.Linear(3 * size * size, classes)
        self.layer.bias.data.zero_()
        self.layer.weight.data = torch.randn(self.layer.weight.shape, generator=random)

    def forward(self, pixels):
        return self.layer(self.dropout(pixels.flatten(1)))


def state(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(module.training, [p.requires_grad for p in module.parameters()]) for module in model.modules()]
    return tensors, flags, [parameter.grad for parameter in model.parameters()]


def same(before, after):
    return all(torch.equal(before[0][name], after[0][name]) for name in before[0]) and before[1:] == after[1:]


def test_transfer_from_itself_is_the_white_box_attack():
    model, (pixels, labels) = Linear().eval(), images()
    attack = PGD(THREAT, steps=5)
    assert torch.equal(TransferAttack(model, attack)(Linear(5), pixels, labels), attack(model, pixels, labels))


def test_transfer_from_itself_breaks_the_same_images_and_another_model_fewer():
    model, (pixels, _) = Linear(), images(64)
    model.eval()
    labels = model(pixels).argmax(1)
    attack = PGD(THREAT, steps=10)
    options = {"threat_model": THREAT, "progress": False, "diagnostics": False}
    white_box = evaluate_robustness(model, (pixels, labels), attack=attack, **options)
    from_itself = evaluate_robustness(model, (pixels, labels), attack=TransferAttack(model, attack), **options)
    other = evaluate_robustness(model, (pixels, labels), attack=TransferAttack(Linear(9), attack), **options)
    assert from_itself.robust_correct == white_box.robust_correct
    assert white_box.robust_accuracy < other.robust_accuracy
    assert from_itself.protocol == "custom"


@pytest.mark.parametrize("name", ["timm_resnet", "timm_vit"])
def test_of_an_adapted_model_the_deployed_route_is_copied(name):
    tiny = MODELS[name]
    source, (pixels, labels) = tiny.adapted(3), images(4, 32)
    before = state(source)
    attack = TransferAttack(source, PGD(THREAT, steps=3))
    found = attack(None, pixels, labels)
    assert same(before, state(source))
    expected = attack.attack(source.pixel_space("robust"), pixels, labels)
    # The copy is the same function up to rounding, which may turn the sign of a gradient near zero.
    assert (found - expected).abs().gt(1e-5).double().mean() < 0.02
    # What happens to the source later does not change the attack.
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 1
    assert torch.equal(attack(None, pixels, labels), found)


def test_leaves_no_trace_in_either_model():
    model, source, (pixels, labels) = Linear(1), Linear(2), images()
    model.train()
    source.train()
    source.dropout.eval()
    model.layer.bias.requires_grad_(False)
    before, source_before = state(model), state(source)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    attack = ["pgd", TransferAttack(source, PGD(THREAT, steps=2))]
    report = evaluate_robustness(model, (pixels, labels), THREAT, attack, progress=False, diagnostics=False)
    assert torch.equal(torch.rand(1), expected)
    assert same(before, state(model)) and same(source_before, state(source))
    assert [row.name for row in report.attacks] == ["PGD-10", "transfer from another model (PGD-2)"]


def test_states_its_settings():
    source = Linear()
    attack = TransferAttack(source, PGD(THREAT), "org/birds")
    assert repr(attack) == repr(TransferAttack(copy.deepcopy(source), PGD(THREAT), "org/birds"))
    assert attack_name(attack) == "transfer from org/birds (PGD-10)"
    settings = attack_settings(attack, THREAT, 0)
    assert settings == {"kind": "custom", "name": str(attack), "source_sha256": attack.source_sha256}
    others = [
        TransferAttack(Linear(1), PGD(THREAT), "org/birds"),
        TransferAttack(source, PGD(THREAT, steps=11), "org/birds"),
        TransferAttack(nn.Sequential(source, nn.Identity()), PGD(THREAT), "org/birds"),
    ]
    assert len({repr(one) for one in (attack, *others)}) == 4


def test_a_checkpoint_recognises_the_source(tmp_path):
    model, (pixels, labels) = Linear(1), images()
    options = {"threat_model": THREAT, "progress": False, "diagnostics": False, "checkpoint_dir": tmp_path}
    first = evaluate_robustness(model, (pixels, labels), attack=[TransferAttack(Linear(2), PGD(THREAT))], **options)
    again = evaluate_robustness(model, (pixels, labels), attack=[TransferAttack(Linear(2), PGD(THREAT))], **options)
    assert replace(again, seconds=0, attacks=[]) == replace(first, seconds=0, attacks=[])
    with pytest.raises(ValueError, match="source_sha256"):
        evaluate_robustness(model, (pixels, labels), attack=[TransferAttack(Linear(3), PGD(THREAT))], **options)


def test_default_search():
    source = MODELS["timm_resnet"].adapted(3)
    assert TransferAttack(source).attack == PGD(source.threat_model, steps=50)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "model"}, TypeError, "`source` must be a module, got str"),
        ({}, ValueError, "`attack` is required: this source states no threat model"),
        ({"attack": "pgd"}, TypeError, "`attack` must be a PGD, got str"),
        ({"attack": PGD(THREAT, loss="targeted")}, ValueError, "with the loss 'ce' or 'kl', got 'targeted'"),
        ({"attack": PGD(THREAT), "name": "a\nb"}, ValueError, "`name` must be a line of printable characters"),
    ],
)
def test_impossible_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        TransferAttack(**{"source": Linear(), **arguments})


def counted(model):
    """How often a model was run, in a list."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: Linear(classes=4), r"returns \(1, 4\) for 1 image.*has 3 classes"),
        (lambda: Linear(size=16), r"does not take images of shape \(3, 8, 8\)"),
        (lambda: MODELS["timm_resnet"].adapted(3), "takes images of 32 x 32 pixels, .* 8 x 8"),
    ],
)
def test_other_classes_and_sizes_are_refused_before_the_work(source, message):
    model, data = Linear(), images()
    calls = counted(model)
    with pytest.raises(ValueError, match=message):
        evaluate_robustness(
            model, data, THREAT, ["pgd", TransferAttack(source(), PGD(THREAT))], progress=False, diagnostics=False
        )
    assert len(calls) <= 1, "but for the pass that counts the classes nothing was run"


def test_other_names_and_threat_models_are_refused():
    model, source = (MODELS["timm_resnet"].adapted(3, seed=seed) for seed in (0, 1))
    model.label_names, source.label_names = ["cat", "dog", "owl"], ["cat", "owl", "dog"]
    with pytest.raises(ValueError, match="class 1 is 'owl' of its source and 'dog' of the model under evaluation"):
        evaluate_robustness(model, images(4, 32), attack=TransferAttack(source), progress=False)
    source.label_names = None
    with pytest.raises(ValueError, match="attacks under Linf, eps = 4/255, the evaluation under Linf, eps = 8/255"):
        attack = TransferAttack(source, PGD(ThreatModel("linf", 4 / 255)))
        evaluate_robustness(model, images(4, 32), attack=attack, progress=False)
