"""Architectures that robust checkpoints have and timm lacks, registered with timm when this is imported."""

from .resnet import CifarResNet, WideResNet


__all__ = ["CifarResNet", "WideResNet"]
