"""Architectures that robust checkpoints have and timm lacks, registered with timm when this is imported."""

from .resnet import CifarResNet, WideResNet, default_cfgs


# timm builds these only where this package is imported as well.
NAMES = tuple(default_cfgs)

__all__ = ["NAMES", "CifarResNet", "WideResNet"]
