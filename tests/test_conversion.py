"""Converters of robust checkpoints: synthetic files with the names of each published kind, and what must be refused.

What a file computes is written down here a second time, over its own names, so that a converted network is compared
with the source and not with the converter.
"""

import argparse
import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from autolora_hf import AutoLoraConfig, Preprocessing, get_autolora_model, load_autolora_model
from autolora_hf.architectures import NAMES
from autolora_hf.backbones import describe_backbone, load_backbone, rebuild_backbone
from autolora_hf.cli import main
from autolora_hf.initializers.conversion import convert_checkpoint, save_conversion


TINY = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
RESNET18 = {"layers": (2, 2, 2, 2), "channels": (64, 128, 256, 512)}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))


# ---- files of each kind ----


def norm(name, width):
    return {
        f"{name}.weight": torch.rand(width) + 0.5,
        f"{name}.bias": torch.randn(width) * 0.1,
        f"{name}.running_mean": torch.randn(width) * 0.1,
        f"{name}.running_var": torch.rand(width) + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(7),
    }


def conv(name, out, into, size):
    return {f"{name}.weight": torch.randn(out, into, size, size) * (2 / (into * size * size)) ** 0.5}


def linear(name, out, into, bias=True):
    return {f"{name}.weight": torch.randn(out, into), **({f"{name}.bias": torch.randn(out)} if bias else {})}


def resnet_file(layers, channels, *, sets=0, down=("downsample.0", "downsample.1"), stem=3):
    """A ResNet of BasicBlocks; each norm is a `bn_list` of `sets`, or plain where that is 0."""

    def norms(name, width):
        if not sets:
            return norm(name, width)
        return {k: v for i in range(sets) for k, v in norm(f"{name}.bn_list.{i}", width).items()}

    state = {**conv("conv1", 64, 3, stem), **norms("bn1", 64)}
    into = 64
    for stage, (blocks, out) in enumerate(zip(layers, channels, strict=True), 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            state |= {**conv(f"{at}.conv1", out, into, 3), **norms(f"{at}.bn1", out)}
            state |= {**conv(f"{at}.conv2", out, out, 3), **norms(f"{at}.bn2", out)}
            if block == 0 and (stage > 1 or into != out):
                state |= {**conv(f"{at}.{down[0]}", out, into, 1), **norms(f"{at}.{down[1]}", out)}
            into = out
    return state


DUAL = ("downsample.conv", "downsample.bn")
SHORTCUT = ("shortcut.0", "shortcut.1")


def normalize(name, mean, std, names=("mean", "std"), shape=(3,)):
    return {f"{name}{names[0]}": torch.tensor(mean).view(shape), f"{name}{names[1]}": torch.tensor(std).view(shape)}


def projection_head(width, sets):
    """`proj_head` of ACL."""
    state = {**linear("fc.fc1", width, width), **linear("fc.fc2", width, width, bias=False)}
    for index in range(sets):
        state |= {**norm(f"fc.bn1.bn_list.{index}", width), **norm(f"fc.bn2.bn_list.{index}", width)}
    return state


def acl_file(shape=TINY, sets=2, head=None):
    state = normalize("normalize.", *IMAGENET) | resnet_file(**shape, sets=sets, down=DUAL)
    return state | (projection_head(shape["channels"][-1], sets) if head is None else head)


def advcl_file():
    state = resnet_file(**TINY, sets=3, down=DUAL)
    for classes in (2, 10, 50, 100, 500):
        state |= linear(f"fc_{classes:03}", classes, 16)
    for head, sizes in {"ce": (16, 10), "proj": (16, 128), "pred": (128, 128)}.items():
        state |= linear(f"head_{head}.0", sizes[0], sizes[0]) | norm(f"head_{head}.1", sizes[0])
        state |= linear(f"head_{head}.3", sizes[1], sizes[0])
    return prefixed("module.", state)


def madry_file(shape=TINY, classes=6):
    network = resnet_file(**shape, stem=7) | linear("fc", classes, shape["channels"][-1])
    buffers = {"names": ("new_mean", "new_std"), "shape": (3, 1, 1)}
    state = normalize("normalizer.", *IMAGENET, **buffers) | prefixed("model.", network)
    state |= normalize("attacker.normalize.", *IMAGENET, **buffers) | prefixed("attacker.model.", network)
    return prefixed("module.", state)


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(path, content):
    torch.save(content, path)
    return path


# ---- what they compute ----


def batch_norm(state, name, x):
    parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *parts)


def resnet_features(state, pixels, normalization, *, norms="", down=("downsample.0", "downsample.1"), padding=1):
    """Features of a network of `resnet_file` by the names in its file; `norms` follows the name of each norm."""
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in normalization)
    large = state["conv1.weight"].shape[-1] == 7
    x = F.conv2d((pixels - mean) / std, state["conv1.weight"], stride=1 + large, padding=3 if large else padding)
    x = batch_norm(state, f"bn1{norms}", x).relu()
    if large:
        x = F.max_pool2d(x, 3, 2, 1)
    for stage in range(1, 5):
        for block in range(100):
            at = f"layer{stage}.{block}"
            if f"{at}.conv1.weight" not in state:
                break
            stride = 2 if stage > 1 and block == 0 else 1
            out = F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(batch_norm(state, f"{at}.bn1{norms}", out).relu(), state[f"{at}.conv2.weight"], padding=1)
            if f"{at}.{down[0]}.weight" in state:
                x = F.conv2d(x, state[f"{at}.{down[0]}.weight"], stride=stride)
                x = batch_norm(state, f"{at}.{down[1]}{norms}", x)
            x = (batch_norm(state, f"{at}.bn2{norms}", out) + x).relu()
    return x.mean((2, 3))


def features(conversion, pixels):
    """Features of a converted network before its head, from pixels in [0, 1]."""
    cfg = conversion.model.pretrained_cfg
    mean, std = (torch.tensor(cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        x = conversion.model.forward_features((pixels - mean) / std)
        return conversion.model.forward_head(x, pre_logits=True)


def close(found, expected):
    assert expected.std() > 1e-3  # not a constant, so that the comparison says something
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return True


def convert(path, **options):
    tiny = {"architecture": "resnet18_cifar", "model_args": TINY, "num_classes": 4}
    return convert_checkpoint(path, **{**tiny, **options})


def refuses(path, *parts, **options):
    with pytest.raises(ValueError) as caught:
        convert(path, **options)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message) < 3000
    return message


def reasons(conversion):
    return {entry["reason"]: entry["names"] for entry in conversion.report["dropped"]}


PIXELS = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# ---- self-supervised checkpoints ----


@pytest.mark.parametrize(("norm_set", "index"), [("adversarial", 1), ("natural", 0)])
def test_the_named_set_of_two_norms_is_taken(tmp_path, norm_set, index):
    state = acl_file()
    path = saved(tmp_path / "model.pt", {"epoch": 3, "state_dict": state, "optim": {"state": {}}})
    options = {} if norm_set == "adversarial" else {"norm_set": norm_set}
    conversion = convert(path, **options)
    weights = conversion.model.state_dict()
    for name in ("bn1", "layer1.0.bn2", "layer4.0.bn1"):
        for part in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(weights[f"{name}.{part}"], state[f"{name}.bn_list.{index}.{part}"])
    assert torch.equal(weights["layer2.0.downsample.0.weight"], state["layer2.0.downsample.conv.weight"])
    ours, theirs = "layer2.0.downsample.1.running_mean", f"layer2.0.downsample.bn.bn_list.{index}.running_mean"
    assert torch.equal(weights[ours], state[theirs])
    expected, other = (
        resnet_features(state, PIXELS, IMAGENET, norms=f".bn_list.{number}", down=DUAL)
        for number in (index, 1 - index)
    )
    assert close(features(conversion, PIXELS), expected)
    assert not torch.allclose(features(conversion, PIXELS), other, atol=1e-2)

    report = conversion.report
    assert report["kind"] == "acl" and report["norm_set"] == norm_set and report["source"]["entry"] == "state_dict"
    assert report["source"]["other_entries"] == ["epoch", "optim"]
    assert report["normalization"] == {"mean": list(IMAGENET[0]), "std": list(IMAGENET[1]), "from": "file"}
    dropped = reasons(conversion)
    assert set(dropped["projection head of the contrastive loss"]) == set(projection_head(16, 2))
    left = [names for reason, names in dropped.items() if reason.startswith("norms of the other inputs")]
    assert left == [sorted(name for name in state if f".bn_list.{1 - index}." in name and name[:2] != "fc")]
    assert report["tensors_used"] + sum(len(names) for names in dropped.values()) == len(state)


def test_a_new_head_is_zero_and_a_head_of_pseudo_labels_is_not_kept(tmp_path):
    path = saved(tmp_path / "model.pt", {"state_dict": acl_file(head=linear("fc", 10, 16))})
    conversion = convert(path, num_classes=10)
    assert conversion.model.fc.weight.shape == (10, 16) and conversion.report["head"] == "new, all zero"
    assert not conversion.model.fc.weight.any() and not conversion.model.fc.bias.any()
    assert not conversion.model(PIXELS).any()
    refuses(path, "Pass num_classes=", num_classes=None)


def test_logits_of_a_fine_tuned_dual_network_are_kept_on_request(tmp_path):
    state = acl_file(head=linear("fc", 10, 16))
    conversion = convert(saved(tmp_path / "aff.pt", {"state_dict": state}), num_classes=None, head="keep")
    expected = resnet_features(state, PIXELS, IMAGENET, norms=".bn_list.1", down=DUAL)
    expected = F.linear(expected, state["fc.weight"], state["fc.bias"])
    folder = save_conversion(conversion, tmp_path / "converted")
    # The package's own model takes pixels, so this is the normalisation as well.
    found = get_autolora_model(str(folder)).eval().pixel_space()(PIXELS)
    assert close(found.detach(), expected)


def test_state_dict_dual_comes_before_state_dict(tmp_path):
    state = acl_file()
    path = saved(tmp_path / "model.pt", {"state_dict": {"other": torch.zeros(1)}, "state_dict_dual": state})
    assert convert(path).report["source"]["entry"] == "state_dict_dual"


def test_momentum_encoder_of_dynacl(tmp_path):
    key, query = acl_file(), acl_file()
    path = saved(tmp_path / "model.pt", prefixed("encoder_q.", query) | prefixed("encoder_k.", key))
    conversion = convert(path)
    expected = resnet_features(key, PIXELS, IMAGENET, norms=".bn_list.1", down=DUAL)
    assert close(features(conversion, PIXELS), expected)
    (names,) = (names for reason, names in reasons(conversion).items() if reason.startswith("query encoder"))
    assert names == sorted(prefixed("encoder_q.", query))


def test_single_norms_after_fine_tuning(tmp_path):
    # DynACL++ with one norm; and what is left of a network whose adversarial norms were never there.
    state = normalize("normalize.", *IMAGENET) | resnet_file(**TINY) | linear("fc", 10, 16)
    conversion = convert(saved(tmp_path / "lpaft.pt", {"state_dict": state}))
    assert conversion.report["kind"] == "acl" and conversion.report["norm_set"] is None
    assert close(features(conversion, PIXELS), resnet_features(state, PIXELS, IMAGENET))
    path = saved(tmp_path / "one.pt", {"state_dict": acl_file(sets=1)})
    refuses(path, "has norms for normal", "norm_set='natural'")
    assert convert(path, norm_set="natural").report["norm_set"] == "natural"


def test_advcl_has_three_sets_and_no_normalisation(tmp_path):
    state = advcl_file()
    conversion = convert(saved(tmp_path / "epoch_1000.ckpt", {"model": state, "epoch": 1}))
    assert conversion.report["kind"] == "advcl"
    assert conversion.report["normalization"]["mean"] == [0, 0, 0]
    assert conversion.report["normalization"]["std"] == [1, 1, 1]
    bare = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    expected = resnet_features(bare, PIXELS, ((0.0,) * 3, (1.0,) * 3), norms=".bn_list.1", down=DUAL)
    assert close(features(conversion, PIXELS), expected)
    dropped = reasons(conversion)
    assert "module.fc_010.weight" in dropped["classifiers of pseudo-labels"]
    assert "module.head_proj.0.weight" in dropped["projection heads of the contrastive loss"]
    folder = save_conversion(conversion, tmp_path / "converted")
    assert get_autolora_model(str(folder)).preprocessing == Preprocessing(
        (32, 32), (0, 0, 0), (1, 1, 1), interpolation="bilinear", crop_pct=1.0
    )


def test_deacl_pads_its_first_convolution_by_two(tmp_path):
    student, teacher = (normalize("normalize.", *CIFAR) | resnet_file(**TINY) for _ in range(2))
    state = prefixed("backbone.", student) | prefixed("momentum_backbone.", teacher)
    state |= linear("classifier", 10, 16) | linear("classifier_adv", 10, 16)
    conversion = convert(saved(tmp_path / "last.ckpt", {"state_dict": state}))
    assert conversion.report["kind"] == "deacl" and conversion.report["model_args"]["stem_padding"] == 2
    assert close(features(conversion, PIXELS), resnet_features(student, PIXELS, CIFAR, padding=2))
    assert not torch.allclose(features(conversion, PIXELS), resnet_features(student, PIXELS, CIFAR), atol=1e-3)
    # The padding is part of what is saved.
    folder = save_conversion(conversion, tmp_path / "converted")
    assert load_backbone(str(folder)).conv1.padding == (2, 2)


def test_names_of_several_kinds_are_not_guessed(tmp_path):
    plain = saved(tmp_path / "plain.pt", {"state_dict": normalize("normalize.", *IMAGENET) | resnet_file(**TINY)})
    refuses(plain, "Pass kind=", "'acl'", "'deacl'")
    assert convert(plain, kind="acl").model.conv1.padding == (1, 1)
    assert convert(plain, kind="deacl").model.conv1.padding == (2, 2)
    dual = saved(tmp_path / "dual.pt", {"state_dict": resnet_file(**TINY, sets=2, down=DUAL)})
    refuses(dual, "Pass kind=")
    refuses(dual, "does not say how the network normalises", kind="acl")
    assert convert(dual, kind="acl", normalization="imagenet").report["normalization"]["from"] == "argument"
    both = saved(tmp_path / "both.pt", prefixed("backbone.", resnet_file(**TINY)) | norm("attacker.x", 3))
    refuses(both, "could be of madry or deacl", "Pass kind=")


# ---- supervised checkpoints ----


def test_madry_logits_normaliser_and_second_copy(tmp_path):
    state = madry_file()
    path = saved(tmp_path / "resnet18_linf.pt", {"model": state, "epoch": 90, "schedule": None})
    conversion = convert(path, architecture="resnet18", num_classes=None)
    bare = {name.removeprefix("module.model."): tensor for name, tensor in state.items()}
    pixels = torch.rand(2, 3, 64, 64)
    expected = F.linear(resnet_features(bare, pixels, IMAGENET), bare["fc.weight"], bare["fc.bias"])
    report = conversion.report
    assert report["kind"] == "madry" and report["head"] == "from the file" and report["num_classes"] == 6
    assert report["image_size"] == [224, 224]
    assert report["normalization"] == {"mean": list(IMAGENET[0]), "std": list(IMAGENET[1]), "from": "file"}
    copy = reasons(conversion)["the same network again, as the attacker holds it"]
    assert copy == sorted(name for name in state if ".attacker.model." in name)
    folder = save_conversion(conversion, tmp_path / "converted")
    model = get_autolora_model(str(folder), image_size=64).eval()
    assert close(model.pixel_space()(pixels).detach(), expected)
    # Another number of classes makes a new head.
    assert convert(path, architecture="resnet18", num_classes=3).report["head"] == "new, all zero"


def test_madry_copy_that_differs_is_refused(tmp_path):
    state = madry_file()
    state["module.attacker.model.conv1.weight"] = state["module.attacker.model.conv1.weight"] + 1
    refuses(saved(tmp_path / "m.pt", {"model": state}), "module.attacker.model.conv1.weight", "differ in this file")
    state = madry_file()
    state["module.attacker.normalize.new_mean"] = torch.zeros(3, 1, 1)
    refuses(saved(tmp_path / "n.pt", {"model": state}), "normalises its input in two ways")


def test_robustbench_names_of_cifar_resnets(tmp_path):
    state = resnet_file(**TINY, down=SHORTCUT) | linear("linear", 10, 16)
    state |= normalize("", *CIFAR, names=("mu", "sigma"), shape=(1, 3, 1, 1))
    conversion = convert(saved(tmp_path / "Engstrom.pt", prefixed("module.", state)), num_classes=None)
    expected = resnet_features(state, PIXELS, CIFAR, down=SHORTCUT)
    assert conversion.report["kind"] == "robustbench" and conversion.report["num_classes"] == 10
    assert close(features(conversion, PIXELS), expected)
    assert torch.equal(conversion.model.fc.weight, state["linear.weight"])


def test_robustbench_imagenet_resnet_needs_its_normalisation(tmp_path):
    state = prefixed("module.model.", resnet_file(**TINY, stem=7) | linear("fc", 5, 16))
    path, options = saved(tmp_path / "Salman.pt", state), {"architecture": "resnet18", "num_classes": None}
    refuses(path, "Pass kind=", **options)
    refuses(path, "Pass normalization=", kind="robustbench", **options)
    conversion = convert(path, kind="robustbench", normalization="imagenet", **options)
    assert conversion.report["normalization"] == {
        "mean": list(IMAGENET[0]),
        "std": list(IMAGENET[1]),
        "from": "argument",
    }
    assert conversion.report["num_classes"] == 5


def wide_file(block, names, top):
    """A WideResNet-10-2 with the names of `block.format(stage, layer)`."""
    state, into = conv(top[0], 16, 3, 3), 16
    for stage, out in enumerate((32, 64, 128)):
        at = block.format(stage + 1, 0) if top[0] == "conv1" else block.format(stage, 0)
        state |= {**norm(f"{at}.{names[0]}", into), **conv(f"{at}.{names[1]}", out, into, 3)}
        state |= {**norm(f"{at}.{names[2]}", out), **conv(f"{at}.{names[3]}", out, out, 3)}
        state |= conv(f"{at}.{names[4]}", out, into, 1)
        into = out
    return state | norm(top[1], 128) | linear(top[2], 10, 128)


def wide_logits(state, x, block, names, top, act, same):
    x = F.conv2d(x, state[f"{top[0]}.weight"], padding=1)
    for stage in range(3):
        at = block.format(stage + 1, 0) if top[0] == "conv1" else block.format(stage, 0)
        stride = 2 if stage else 1
        x = act(batch_norm(state, f"{at}.{names[0]}", x))
        padded = F.pad(x, (0, 1, 0, 1)) if same and stride == 2 else F.pad(x, (1, 1, 1, 1))
        out = F.conv2d(padded, state[f"{at}.{names[1]}.weight"], stride=stride)
        out = F.conv2d(act(batch_norm(state, f"{at}.{names[2]}", out)), state[f"{at}.{names[3]}.weight"], padding=1)
        x = F.conv2d(x, state[f"{at}.{names[4]}.weight"], stride=stride) + out
    x = F.avg_pool2d(act(batch_norm(state, top[1], x)), 8).flatten(1)
    return F.linear(x, state[f"{top[2]}.weight"], state[f"{top[2]}.bias"])


TRADES = ("block{}.layer.{}", ("bn1", "conv1", "bn2", "conv2", "convShortcut"), ("conv1", "bn1", "fc"))
DEEPMIND = (
    "layer.{}.block.{}",
    ("batchnorm_0", "conv_0", "batchnorm_1", "conv_1", "shortcut"),
    ("init_conv", "batchnorm", "logits"),
)


@pytest.mark.parametrize(
    ("names", "act", "same", "normalization"),
    [(TRADES, F.relu, False, "none"), (DEEPMIND, F.silu, True, "cifar10")],
    ids=["TRADES", "DeepMind"],
)
def test_robustbench_wide_resnets(tmp_path, names, act, same, normalization):
    state = wide_file(*names)
    unused = prefixed("sub_block1.layer.0.", conv("conv1", 32, 16, 3)) if names is TRADES else {}
    path = saved(tmp_path / "wide.pt", {"state_dict": prefixed("module.", state | unused)})
    options = {"architecture": "wide_resnet28_10_cifar", "model_args": {"depth": 10, "width": 2}, "num_classes": None}
    refuses(path, "Pass normalization=", **options)
    conversion = convert(path, **options, normalization=normalization)
    mean, std = (torch.tensor(conversion.report["normalization"][part]).view(3, 1, 1) for part in ("mean", "std"))
    expected = wide_logits(state, (PIXELS - mean) / std, *names, act, same)
    folder = save_conversion(conversion, tmp_path / "converted")
    assert close(get_autolora_model(str(folder)).eval().pixel_space()(PIXELS).detach(), expected)
    if unused:
        assert reasons(conversion)["a block that the network holds and never runs"] == [f"module.{n}" for n in unused]


# ---- strictness ----


def test_every_name_is_accounted_for(tmp_path):
    def path(change):
        state = acl_file()
        change(state)
        return saved(tmp_path / "m.pt", {"state_dict": state})

    refuses(path(lambda s: s.update({"layer9.weight": torch.zeros(2)})), "unknown: layer9.weight")
    refuses(path(lambda s: s.pop("layer2.0.conv2.weight")), "missing: layer2.0.conv2.weight")
    missing = "layer2.0.bn1.bn_list.1.running_var"
    refuses(path(lambda s: s.pop(missing)), "missing: layer2.0.bn1.running_var")
    refuses(
        path(lambda s: s.update({"conv1.weight": torch.zeros(64, 3, 5, 5)})),
        "of another shape: conv1.weight (64, 3, 5, 5) for (64, 3, 3, 3)",
    )
    refuses(path(lambda s: s.update({"bn1.weight": torch.zeros(64)})), "bn1.weight", "would both be bn1.weight")
    refuses(path(lambda s: s.pop("normalize.std")), "normalize.mean", "a mean and a standard deviation")
    for value, words in ((float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite")):
        refuses(path(lambda s, value=value: s["conv1.weight"].view(-1)[5:6].fill_(value)), words)
    refuses(path(lambda s: s["bn1.bn_list.1.running_var"].neg_()), "negative variances")
    # The set that is left out is not looked at.
    assert convert(path(lambda s: s["bn1.bn_list.0.running_var"].neg_()))
    refuses(path(lambda s: s), "not with", normalization="cifar10")


def test_counters_that_old_files_lack(tmp_path):
    state = {name: tensor for name, tensor in acl_file().items() if not name.endswith("tracked")}
    conversion = convert(saved(tmp_path / "old.pt", {"state_dict": state}))
    assert "num_batches_tracked" in conversion.report["notes"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "air"}, "`kind` must be one of"),
        ({"norm_set": "both"}, "`norm_set` must be one of"),
        ({"num_classes": 0}, "at least 1"),
        ({"architecture": "resnet19"}, "must be the name of a timm model"),
        ({"head": "keep"}, "but the file has none"),
        ({"normalization": "mnist"}, "`normalization` must be one of"),
        ({"architecture": None}, "`model_args` needs `architecture`"),
    ],
)
def test_arguments(tmp_path, options, message):
    refuses(saved(tmp_path / "m.pt", {"state_dict": acl_file()}), message, **options)


# ---- files that are not what they seem ----


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_calls_code_is_refused_and_not_run(tmp_path, form):
    touched, path = tmp_path / "touched", tmp_path / "evil.pt"
    content = {"state_dict": acl_file(), "optim": Payload(touched)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    if form == "bare pickle":
        with pytest.raises(ValueError, match=r"was not loaded"):
            convert(path)
    else:
        module = os.mkdir.__module__
        refuses(path, f"{module}.mkdir", "Nothing of it was run", "safetensors", "weights_only=False")
    assert not touched.exists()
    # The trap works: what must not happen does where the file is trusted.
    if form != "bare pickle":
        torch.load(path, weights_only=False)
        assert touched.exists()


def test_the_way_out_for_such_a_file_works(tmp_path):
    state = acl_file()
    path = saved(tmp_path / "madry.pt", {"state_dict": state, "schedule": pytest.importorskip("timm").create_model})
    message = refuses(path, "timm.models._factory.create_model")
    code = "\n".join(line[4:] for line in message.splitlines() if line.startswith("    "))
    code = code.replace("'madry.pt'", repr(str(path))).replace('"weights', f'"{tmp_path}/weights')
    exec(code, {})
    assert convert(tmp_path / "weights.safetensors").report["tensors_used"] > 0


def test_plain_values_beside_the_weights_are_not_in_the_way(tmp_path):
    content = {
        "args": argparse.Namespace(lr=0.1, names=["a"]),
        "acc": np.float64(0.5),
        "curve": np.arange(3.0),
        "state_dict": acl_file(),
    }
    conversion = convert(saved(tmp_path / "m.pt", content))
    assert conversion.report["source"]["other_entries"] == ["acc", "args", "curve"]


def test_files_of_absurd_size_are_not_unpacked(tmp_path):
    path = saved(tmp_path / "m.pt", {"state_dict": acl_file()})
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    refuses(packed, "torch writes no such files")
    # One number that claims to be a terabyte.
    huge = {"conv1.weight": torch.zeros(1).expand(10**6, 10**6)}
    refuses(saved(tmp_path / "huge.pt", acl_file() | huge), "conv1.weight is no plain tensor")


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"state_dict": {}}, "holds 0 weights"),
        ({"epoch": 3, "net": {}}, "is no state dict"),
        ({"state_dict": {"conv1.weight": 3}}, "is no plain tensor"),
        ({"a": torch.zeros(2).to_sparse()}, "is no plain tensor"),
        ({"conv1.bias": torch.zeros(2)}, "of no kind that can be told"),
    ],
)
def test_files_without_a_network(tmp_path, content, message):
    refuses(saved(tmp_path / "m.pt", content), message)


def test_damaged_and_missing_files(tmp_path):
    path = saved(tmp_path / "m.pt", {"state_dict": acl_file()})
    (tmp_path / "short.pt").write_bytes(path.read_bytes()[:5000])
    refuses(tmp_path / "short.pt", "was not loaded")
    (tmp_path / "page.pt").write_text("<html>Sign in to continue</html>")
    refuses(tmp_path / "page.pt", "was not loaded")
    (tmp_path / "short.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    refuses(tmp_path / "short.safetensors", "damaged or truncated")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        convert(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert(tmp_path / "no.pt")


# ---- the command, with a network of full size ----


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    torch.manual_seed(0)
    state = acl_file(RESNET18)
    path = tmp_path_factory.mktemp("converted") / "model.safetensors"
    save_file(state, path)
    return path, state


def test_command(resnet18, tmp_path, capsys):
    path, state = resnet18
    output = tmp_path / "dynacl"
    assert main(["convert", str(path), str(output), "--num-classes", "7"]) == 0
    text = capsys.readouterr().out
    assert "a resnet18_cifar with its adversarial norms" in text and f"autolora train --model {output}" in text
    assert "projection head" in text
    report = json.loads((output / "conversion.json").read_text())
    assert report["source"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["source"]["file"] == "model.safetensors" and str(tmp_path) not in json.dumps(report)
    assert sorted(entry.name for entry in output.iterdir()) == ["config.json", "conversion.json", "model.safetensors"]

    backbone = load_backbone(str(output)).eval()
    assert backbone.pretrained_cfg["input_size"] == (3, 32, 32) and backbone.num_classes == 7
    expected = resnet_features(state, PIXELS, IMAGENET, norms=".bn_list.1", down=DUAL)
    model = get_autolora_model(str(output))
    assert (model.preprocessing.mean, model.preprocessing.std) == IMAGENET
    with torch.no_grad():
        normalised = (PIXELS - torch.tensor(IMAGENET[0]).view(3, 1, 1)) / torch.tensor(IMAGENET[1]).view(3, 1, 1)
        found = backbone.forward_head(backbone.forward_features(normalised), pre_logits=True)
    assert close(found, expected)
    # Another number of classes than the file's, and the same through transformers.
    assert load_backbone(str(output), 5).num_classes == 5
    wrapped = load_backbone(str(output), library="transformers").eval()
    torch.testing.assert_close(wrapped(normalised).logits, backbone(normalised))
    # The backbone can be built from its record, and an earlier conversion is replaced; other folders are not.
    assert rebuild_backbone(describe_backbone(backbone, None)).conv1.kernel_size == (3, 3)
    assert main(["convert", str(path), str(output), "--num-classes", "3", "--norm-set", "natural"]) == 0
    assert load_backbone(str(output)).num_classes == 3
    assert main(["convert", str(path), str(tmp_path), "--num-classes", "3"]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_command_says_what_is_missing(resnet18, tmp_path, capsys):
    path, _ = resnet18
    assert main(["convert", str(path), str(tmp_path / "out")]) == 1
    assert "--num-classes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_96_pixels_of_stl(tmp_path):
    state = normalize("normalize.", *IMAGENET) | resnet_file(**TINY, sets=2, down=DUAL, stem=7)
    conversion = convert(saved(tmp_path / "stl.pt", state), architecture="resnet18")
    assert conversion.report["image_size"] == [96, 96]
    pixels = torch.rand(2, 3, 96, 96)
    expected = resnet_features(state, pixels, IMAGENET, norms=".bn_list.1", down=DUAL)
    assert close(features(conversion, pixels), expected)


@pytest.mark.parametrize("mode", ["full", "adapter"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18_cifar", {**TINY, "stem_padding": 2}),
        ("wide_resnet34_10_cifar", {"depth": 10, "width": 1, "act_layer": "silu", "same_padding": True}),
    ],
)
def test_registered_architectures_save_and_load(tmp_path, name, options, mode):
    backbone = timm.create_model(name, num_classes=5, **options)
    assert timm.is_model(name) and name in NAMES and backbone.pretrained_cfg["input_size"] == (3, 32, 32)
    model = get_autolora_model(backbone, AutoLoraConfig(mode=mode)).eval()
    pixels = torch.rand(2, 3, 32, 32)
    expected = model.pixel_space()(pixels)
    model.save_pretrained(tmp_path)
    base = timm.create_model(name, num_classes=5, **options) if mode == "adapter" else None
    if base is not None:
        base.load_state_dict(model.get_base_model().state_dict(), strict=False)
    loaded = load_autolora_model(tmp_path, base_model=base)
    if mode == "full":
        torch.testing.assert_close(loaded.pixel_space()(pixels), expected)
    # Features of timm's own kind, and activation checkpointing, which training may ask for.
    fresh = timm.create_model(name, num_classes=5, **options)
    fresh.set_grad_checkpointing()
    fresh.train()(pixels).sum().backward()
    assert fresh.conv1.weight.grad is not None
    fresh.reset_classifier(2)
    assert fresh(pixels).shape == (2, 2) and fresh.get_classifier().out_features == 2
    pyramid = timm.create_model(name, features_only=True, out_indices=(-1,), **options)
    assert pyramid(pixels)[0].shape[2] == 32 // pyramid.feature_info.reduction()[-1] + (name[0] == "r" and 1)


def test_arguments_of_a_stranger_that_would_fill_memory():
    with pytest.raises(ValueError, match="`stem_padding` must be between"):
        timm.create_model("resnet18_cifar", stem_padding=100_000)
    with pytest.raises(ValueError, match="`depth` must be"):
        timm.create_model("wide_resnet28_10_cifar", depth=29)


def test_timm_knows_the_architectures_after_an_import():
    code = "import timm, autolora_hf; timm.create_model('resnet18_cifar'); from autolora_hf import load_autolora_model"
    subprocess.run([sys.executable, "-c", code], check=True)
