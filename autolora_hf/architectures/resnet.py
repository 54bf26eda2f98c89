"""ResNets for images of 32 pixels, as the robustness literature trains them on CIFAR.

They are registered in timm's family `resnet`, so that `timm.create_model`, saving, and records of backbones know them
by name. A checkpoint of one of them needs this package to be imported before timm can build it.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import create_classifier, get_act_layer
from timm.models import build_model_with_cfg, checkpoint_seq, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (4, 4),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        # A new network normalises as timm's others do; converted ones carry what they were trained with.
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "conv1",
        "classifier": "fc",
        **changes,
    }


default_cfgs = {
    "resnet18_cifar": _cfg(),
    "resnet34_cifar": _cfg(),
    "resnet50_cifar": _cfg(),
    "wide_resnet28_10_cifar": _cfg(pool_size=(8, 8)),
    "wide_resnet34_10_cifar": _cfg(pool_size=(8, 8)),
    "wide_resnet34_20_cifar": _cfg(pool_size=(8, 8)),
    "wide_resnet70_16_cifar": _cfg(pool_size=(8, 8)),
}


class CifarResNet(ResNet):
    """timm's ResNet with the stem for small images: one 3x3 convolution of stride 1 and no pooling.

    The layers have timm's names. Same network as `models/resnet.py` of GodXuxilie/RobustSSL_Benchmark, and as the
    ResNets of kuangliu/pytorch-cifar in MadryLab/robustness and RobustBench.

    Args:
        stem_padding (`int`): Padding of the first convolution. 2 is that of solo-learn and so of DeACL, whose feature
            maps are therefore 34 pixels wide for an image of 32.
        kwargs: Those of timm's ResNet.
    """

    def __init__(self, *args: Any, stem_padding: int = 1, in_chans: int = 3, **kwargs: Any) -> None:
        if not 0 <= stem_padding <= 3:
            raise ValueError(f"`stem_padding` must be between 0 and 3, got {stem_padding}.")
        super().__init__(*args, in_chans=in_chans, **kwargs)  # type: ignore[misc]  # `args` end before it
        created = {name: kwargs.get(name) for name in ("device", "dtype")}
        self.conv1 = nn.Conv2d(in_chans, self.bn1.num_features, 3, padding=stem_padding, bias=False, **created)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        for stage in self.feature_info:
            stage["reduction"] = max(1, stage["reduction"] // 4)


class _WideBlock(nn.Module):
    """Pre-activation block; where the number of channels changes, the shortcut starts after the first activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        act_layer: type[nn.Module],
        same_padding: bool,
        **created: Any,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, **created)
        self.act1 = act_layer()
        beyond = same_padding and stride == 2
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if beyond else nn.Identity()
        conv = {"bias": False, **created}
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=0 if beyond else 1, **conv)
        self.bn2 = nn.BatchNorm2d(out_channels, **created)
        self.act2 = act_layer()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, **conv)
        self.downsample = None
        if in_channels != out_channels:
            self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, **conv)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.act1(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(activated)
        out = self.conv1(self.pad(activated))
        return self.conv2(self.act2(self.bn2(out))) + shortcut


class WideResNet(nn.Module):
    """Wide residual network (Zagoruyko & Komodakis 2016) with three stages, for images of 32 pixels.

    With the defaults it is the network of yaodongyu/TRADES, which most RobustBench entries use; with
    `act_layer="silu", same_padding=True` that of google-deepmind/deepmind-research `adversarial_robustness`, which
    RobustBench calls `DMWideResNet` and uses with Swish.

    Args:
        depth (`int`), width (`int`): Number of layers, 6 n + 4, and factor of the numbers of channels.
        num_classes (`int`), in_chans (`int`), global_pool (`str`), drop_rate (`float`): As in timm's ResNet.
        act_layer (`str`): Name of timm's activation.
        same_padding (`bool`): Pad before a convolution of stride 2 as TensorFlow does: right and below only.
    """

    def __init__(
        self,
        depth: int = 28,
        width: int = 10,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        act_layer: str = "relu",
        same_padding: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"`depth` must be 6 n + 4, such as 28 or 34, got {depth}.")
        created = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        act = get_act_layer(act_layer)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **created)
        self.feature_info = []
        channels = 16
        for stage in range(3):
            wide = 16 * width * 2**stage
            blocks = []
            for index in range((depth - 4) // 6):
                stride = 2 if stage and not index else 1
                blocks.append(_WideBlock(channels, wide, stride, act, same_padding, **created))
                channels = wide
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": wide, "reduction": 2**stage, "module": f"layer{stage + 1}"})
        self.norm = nn.BatchNorm2d(channels, **created)
        self.act = act()
        self.num_features = self.head_hidden_size = channels
        self.global_pool, self.fc = create_classifier(channels, num_classes, pool_type=global_pool, **created)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(self.fc, nn.Linear):
            nn.init.zeros_(self.fc.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": "^conv1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        created = {"device": self.conv1.weight.device, "dtype": self.conv1.weight.dtype}
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **created)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for stage in (self.layer1, self.layer2, self.layer3):
            checkpointed = self.grad_checkpointing and not torch.jit.is_scripting()
            x = checkpoint_seq(stage, x) if checkpointed else stage(x)
        return self.act(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if self.drop_rate:
            x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cifar_resnet(variant: str, pretrained: bool, arguments: dict[str, Any], changes: dict[str, Any]) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, **{**arguments, **changes})


def _wide_resnet(variant: str, pretrained: bool, depth: int, width: int, changes: dict[str, Any]) -> WideResNet:
    return build_model_with_cfg(WideResNet, variant, pretrained, **{"depth": depth, "width": width, **changes})


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 with a 3x3 stem of stride 1."""
    return _cifar_resnet("resnet18_cifar", pretrained, {"block": BasicBlock, "layers": (2, 2, 2, 2)}, kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-34 with a 3x3 stem of stride 1."""
    return _cifar_resnet("resnet34_cifar", pretrained, {"block": BasicBlock, "layers": (3, 4, 6, 3)}, kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-50 with a 3x3 stem of stride 1."""
    return _cifar_resnet("resnet50_cifar", pretrained, {"block": Bottleneck, "layers": (3, 4, 6, 3)}, kwargs)


@register_model
def wide_resnet28_10_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WideResNet-28-10."""
    return _wide_resnet("wide_resnet28_10_cifar", pretrained, 28, 10, kwargs)


@register_model
def wide_resnet34_10_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WideResNet-34-10."""
    return _wide_resnet("wide_resnet34_10_cifar", pretrained, 34, 10, kwargs)


@register_model
def wide_resnet34_20_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WideResNet-34-20."""
    return _wide_resnet("wide_resnet34_20_cifar", pretrained, 34, 20, kwargs)


@register_model
def wide_resnet70_16_cifar(pretrained: bool = False, **kwargs: Any) -> WideResNet:
    """WideResNet-70-16."""
    return _wide_resnet("wide_resnet70_16_cifar", pretrained, 70, 16, kwargs)
