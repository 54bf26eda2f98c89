"""Names of weights in robust checkpoints of the field, and what they are called in timm.

Every tensor of a file is renamed, taken as statistics of the input normalisation, or dropped for a reason that is
reported; what is left over under a name that the network does not have is an error later.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..checks import listed, printable


NORM_SETS = ("adversarial", "natural")

# Statistics that the entries of `normalization=` stand for. CIFAR: `dm_wide_resnet.py` of RobustBench; "half" maps
# pixels to [-1, 1].
NORMALIZATIONS = MappingProxyType(
    {
        "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    }
)

# Buffers of a normalisation within the network, mean and standard deviation: those of ACL and DeACL
# (`NormalizeByChannelMeanStd`) and RobustBench's `normalize_model`; MadryLab's `InputNormalize`; of RobustBench's
# CIFAR networks.
_NORMALISERS = (
    ("normalize.mean", "normalize.std"),
    ("normalizer.new_mean", "normalizer.new_std"),
    ("attacker.normalize.new_mean", "attacker.normalize.new_std"),
    ("mu", "sigma"),
    ("mean", "std"),
)


class Keys:
    """Tensors of a file on their way to the names of a network.

    Args:
        tensors (`dict[str, Tensor]`): By their names in the file.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        # Present name to name in the file, which is the one that messages and the report use.
        self.original = {name: name for name in tensors}
        self.tensors = dict(tensors)
        self.dropped: dict[str, list[str]] = {}
        self.normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None
        # Of the architectures for 32 pixels, where the code that wrote the file had its own.
        self.model_args: dict[str, Any] = {}

    def has(self, pattern: str) -> bool:
        """Whether `pattern` is found in a name."""
        return any(re.search(pattern, name) for name in self.tensors)

    def drop(self, pattern: str, reason: str) -> None:
        """Leaves out every tensor whose name begins as `pattern`."""
        for name in [name for name in self.tensors if re.match(pattern, name)]:
            self.take(name, reason)

    def take(self, name: str, reason: str) -> Tensor:
        """Takes one tensor out."""
        self.dropped.setdefault(reason, []).append(self.original.pop(name))
        return self.tensors.pop(name)

    def rename(self, pattern: str, replacement: str) -> None:
        """Puts `replacement` where `pattern` is found.

        Raises:
            ValueError: If two tensors would have one name.
        """
        tensors: dict[str, Any] = {}
        original: dict[str, str] = {}
        for name, tensor in self.tensors.items():
            new = re.sub(pattern, replacement, name, count=1)
            if new in tensors:
                both = f"{printable(original[new])} and {printable(self.original[name])}"
                raise ValueError(f"The file is ambiguous: {both} would both be {printable(new)}.")
            tensors[new], original[new] = tensor, self.original[name]
        self.tensors, self.original = tensors, original

    def remove_prefix(self, prefix: str) -> bool:
        """Takes `prefix` from all names if all of them have it."""
        found = bool(self.tensors) and all(name.startswith(prefix) for name in self.tensors)
        if found:
            self.rename("^" + re.escape(prefix), "")
        return found

    def take_normaliser(self) -> None:
        """Takes mean and standard deviation out of the tensors.

        Raises:
            ValueError: If they are not those of a normalisation of RGB, or there are two that differ.
        """
        for pair in _NORMALISERS:
            if pair[0] not in self.tensors and pair[1] not in self.tensors:
                continue
            names = [name for name in pair if name in self.tensors]
            tensors = [self.take(name, "input normalisation; it is in the checkpoint's config") for name in names]
            if len(tensors) != 2 or any(tensor.numel() != 3 for tensor in tensors):
                raise ValueError(f"{listed(names)}: expected a mean and a standard deviation of three channels.")
            # The shortest decimals that are the same numbers in the precision of a network.
            mean, std = (tuple(float(str(value)) for value in tensor.float().numpy().ravel()) for tensor in tensors)
            if not all(map(_finite, mean)) or not all(_finite(value) and value > 0 for value in std):
                raise ValueError(f"{listed(names)} hold {mean} and {std}, which no image can be normalised with.")
            if self.normalization not in (None, (mean, std)):
                raise ValueError(f"The file normalises its input in two ways: {self.normalization} and {(mean, std)}.")
            self.normalization = mean, std


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


@dataclass(frozen=True)
class Kind:
    """A family of checkpoints.

    Args:
        title (`str`): What it is called in messages.
        translate (`Callable[[Keys, str], None]`): Gives the tensors timm's names, for a set of norms.
        labels (`bool`): Whether a head in the file is one for real classes, which may be kept.
        normalization (`str`, *optional*): The one it was trained with, where that is a property of its code.
        image_size (`int`): Of checkpoints whose first convolution is 7x7.
    """

    title: str
    translate: Callable[[Keys, str], None]
    labels: bool
    normalization: str | None = None
    image_size: int = 224


def _choose_norms(keys: Keys, norm_set: str, names: tuple[str, ...]) -> None:
    """Keeps one set of norms: `bn1.bn_list.<index>.weight` becomes `bn1.weight`."""
    if not keys.has(r"\.bn_list\."):
        return
    indices = {int(found[1]) for name in keys.tensors if (found := re.search(r"\.bn_list\.(\d+)\.", name))}
    wanted = names.index("normal" if norm_set == "natural" else "pgd")
    if not indices:
        # `batch_norm_multiple` without names has one norm and no list.
        keys.rename(r"\.bn_list\.", ".")
        return
    if wanted not in indices or not indices <= set(range(len(names))):
        held = ", ".join(names[index] if index < len(names) else f"number {index}" for index in sorted(indices))
        other = "natural" if norm_set == "adversarial" else "adversarial"
        raise ValueError(
            f"The file has norms for {held}; the {norm_set} ones would be {names[wanted]!r}, at bn_list.{wanted}. "
            f"Pass norm_set={other!r} (--norm-set {other}) if those are what you want."
        )
    for index in sorted(indices - {wanted}):
        keys.drop(rf".*\.bn_list\.{index}\.", f"norms of the other inputs ({names[index]!r}, bn_list.{index})")
    keys.rename(rf"\.bn_list\.{wanted}\.", ".")


def _acl(keys: Keys, norm_set: str) -> None:
    """`models/resnet_multi_bn.py` and `resnet_multi_bn_stl.py` of VITA-Group/Adversarial-Contrastive-Learning,
    PKU-ML/DYNACL (`resnet18_momentum` has two encoders, of which its forward runs `encoder_k`) and
    GodXuxilie/Enhancing_ACL_via_AIR; `bn_names = ['normal', 'pgd']` in their training scripts, whose `cvt_state_dict`
    takes index 1. With one norm (`resnet.py`, `LPAFT.py`) the names are timm's already.
    """
    if keys.has(r"^encoder_k\."):
        keys.drop(r"encoder_q\.", "query encoder; the network computes with the momentum encoder, encoder_k")
        keys.remove_prefix("encoder_k.")
        keys.remove_prefix("module.")
    keys.take_normaliser()
    keys.drop(r"fc\.(fc|bn)\d\.", "projection head of the contrastive loss")
    _choose_norms(keys, norm_set, ("normal", "pgd"))
    keys.rename(r"downsample\.conv\.", "downsample.0.")
    keys.rename(r"downsample\.bn\.", "downsample.1.")


def _advcl(keys: Keys, norm_set: str) -> None:
    """`models/resnet_cifar_multibn_ensembleFC.py` of LijieFan/AdvCL and of yqy2001/A-InfoNCE (Asym-AdvCL), with
    `bn_names = ['normal', 'pgd', 'pgd_ce']`: contrastive views, the attack on the contrastive loss, that on the
    cross-entropy of pseudo-labels. Their `load_BN_checkpoint` takes index 1. What their
    fine-tuning saves (`models/resnet_cifar.py`) has one norm, and the names of kuangliu/pytorch-cifar.
    """
    keys.take_normaliser()
    keys.drop(r"head_(proj|pred)\.", "projection heads of the contrastive loss")
    keys.drop(r"(head_ce|fc_\d{3})\.", "classifiers of pseudo-labels")
    _choose_norms(keys, norm_set, ("normal", "pgd", "pgd_ce"))
    keys.rename(r"downsample\.conv\.", "downsample.0.")
    keys.rename(r"downsample\.bn\.", "downsample.1.")
    _kuangliu(keys)


def _deacl(keys: Keys, norm_set: str) -> None:
    """`solo/methods/base_for_adversarial_training.py` and `solo/models/resnet_add_normalize.py` of
    pantheon5100/DeACL; `adv_finetune.py` reads `backbone.` alone. The first convolution has padding 2 in both, as in
    solo-learn.
    """
    keys.model_args = {"stem_padding": 2}
    if keys.has(r"^backbone\."):
        keys.drop(r"momentum_(backbone|projector|classifier)\.", "the teacher")
        keys.drop(r"classifier(_adv)?\.", "classifiers that were trained on the side")
        keys.drop(r"projector\.", "projection head of the distillation")
        keys.rename(r"^backbone\.", "")
    keys.take_normaliser()


def _madry(keys: Keys, norm_set: str) -> None:
    """`AttackerModel` of MadryLab/robustness, `attacker.py`, saved by its `train.py` within `DataParallel`; so are the
    checkpoints of microsoft/robust-models-transfer. The network is in the file twice, as `model` and within
    `attacker`. Architectures of its own have one more `model.` (`DummyModel`).
    """
    keys.take_normaliser()
    for name in [name for name in keys.tensors if name.startswith("attacker.model.")]:
        twin = name.removeprefix("attacker.")
        if twin not in keys.tensors:
            continue
        if not torch.equal(keys.tensors[twin], keys.tensors[name]):
            raise ValueError(
                f"{printable(keys.original[name])} and {printable(keys.original[twin])} are one layer in MadryLab's "
                "library but differ in this file."
            )
        keys.take(name, "the same network again, as the attacker holds it")
    while keys.remove_prefix("model."):
        pass
    _kuangliu(keys)


def _robustbench(keys: Keys, norm_set: str) -> None:
    """`load_model` of RobustBench, `utils.py`: `module.` and `model.` are prefixes. `wide_resnet.py` is the network of
    yaodongyu/TRADES, whose `sub_block1` is made and never run; `dm_wide_resnet.py` is DeepMind's; `resnet.py` is
    kuangliu/pytorch-cifar.
    """
    keys.rename(r"^model\.", "")
    keys.take_normaliser()
    if keys.has(r"^block1\.layer\.0\."):
        keys.drop(r"sub_block1\.", "a block that the network holds and never runs")
        keys.rename(r"^bn1\.", "norm.")
        keys.rename(r"^block(\d)\.layer\.(\d+)\.convShortcut\.", r"layer\1.\2.downsample.")
        keys.rename(r"^block(\d)\.layer\.(\d+)\.", r"layer\1.\2.")
    elif keys.has(r"^layer\.0\.block\.0\."):
        # All that RobustBench has of these are made with `activation_fn=Swish` or `nn.SiLU`.
        keys.model_args = {"act_layer": "silu", "same_padding": True}
        for stage in range(3):
            keys.rename(rf"^layer\.{stage}\.block\.(\d+)\.", rf"layer{stage + 1}.\1.")
        for layer in range(2):
            keys.rename(rf"\.batchnorm_{layer}\.", f".bn{layer + 1}.")
            keys.rename(rf"\.conv_{layer}\.", f".conv{layer + 1}.")
        keys.rename(r"\.shortcut\.", ".downsample.")
        keys.rename(r"^init_conv\.", "conv1.")
        keys.rename(r"^batchnorm\.", "norm.")
        keys.rename(r"^logits\.", "fc.")
    else:
        _kuangliu(keys)


def _kuangliu(keys: Keys) -> None:
    """Names of kuangliu/pytorch-cifar, `models/resnet.py`."""
    keys.rename(r"\.shortcut\.([01])\.", r".downsample.\1.")
    keys.rename(r"^linear\.", "fc.")


KINDS = {
    "acl": Kind("ACL, DynACL, DynACL++, AIR or AIR++", _acl, labels=False, image_size=96),
    "advcl": Kind("AdvCL or A-InfoNCE", _advcl, labels=False, normalization="none"),
    "deacl": Kind("DeACL", _deacl, labels=False),
    "madry": Kind("MadryLab robustness or robust-models-transfer", _madry, labels=True),
    "robustbench": Kind("RobustBench", _robustbench, labels=True),
}
_AMBIGUOUS = (
    "Pass kind= (--kind): 'acl' (ACL, DynACL, AIR, also after fine-tuning), 'advcl' (AdvCL, A-InfoNCE; trained "
    "without input normalisation), 'deacl' (its first convolution pads by 2), 'madry' (robustness, "
    "robust-models-transfer) or 'robustbench'."
)


def recognise(keys: Keys) -> str:
    """The kind of checkpoint that has these names.

    Raises:
        ValueError: If several have them, or none.
    """
    dual, normalised = keys.has(r"\.bn_list\."), keys.has(r"^(encoder_k\.(module\.)?)?normalize\.(mean|std)$")
    advcl_heads = keys.has(r"^(head_(proj|pred|ce)|fc_\d{3})\.")
    found = []
    if keys.has(r"^attacker\.") or keys.has(r"^normalizer\.new_"):
        found.append("madry")
    if keys.has(r"^backbone\."):
        found.append("deacl")
    if advcl_heads and not normalised:
        found.append("advcl")
    # A classifier beside a normalisation, in timm's names, is that of a fine-tuned network of this family.
    if normalised and not advcl_heads and (dual or (keys.has(r"^fc\.") and not keys.has(r"^model\."))):
        found.append("acl")
    if keys.has(r"^(model\.)?(block1\.layer\.0|init_conv|mu$|sigma$)") or (
        keys.has(r"\.shortcut\.") and not advcl_heads and not found
    ):
        found.append("robustbench")
    if len(found) != 1:
        what = f"could be of {' or '.join(found)}" if found else "are of no kind that can be told from them alone"
        raise ValueError(f"The names of the weights ({listed(sorted(keys.tensors), 3)}) {what}. {_AMBIGUOUS}")
    return found[0]
