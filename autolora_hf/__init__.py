"""Adversarially robust fine-tuning of any timm or Hugging Face vision checkpoint, without a hyper-parameter search."""

from .attacks import PGD
from .config import AutoLoraConfig, ThreatModel
from .modeling import AutoLoraModel, get_autolora_model, load_autolora_model
from .pixels import Preprocessing


__version__ = "0.1.0"

__all__ = [
    "PGD",
    "AutoLoraConfig",
    "AutoLoraModel",
    "Preprocessing",
    "ThreatModel",
    "get_autolora_model",
    "load_autolora_model",
]
