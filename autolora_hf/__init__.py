"""Adversarially robust fine-tuning of any timm or Hugging Face vision checkpoint, without a hyper-parameter search."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .attacks import PGD
    from .config import AutoLoraConfig, ThreatModel
    from .evaluation import RobustnessReport, TransferAttack, evaluate_robustness
    from .factory import get_autolora_model, load_autolora_model
    from .hub.export import export_onnx
    from .hub.extraction import extract_adapter, extract_for_accuracy
    from .hub.verification import verify_release
    from .modeling import AutoLoraModel
    from .objectives import config_for
    from .pixels import Preprocessing
    from .training import AutoLoraTrainer, AutoLoraTrainingArguments


__version__ = "0.1.0"

# Imported when first used: torch, timm and transformers take seconds, and `autolora --help` needs none of them.
_MODULES = {
    "PGD": "attacks",
    "AutoLoraConfig": "config",
    "AutoLoraModel": "modeling",
    "AutoLoraTrainer": "training",
    "AutoLoraTrainingArguments": "training",
    "Preprocessing": "pixels",
    "RobustnessReport": "evaluation",
    "ThreatModel": "config",
    "TransferAttack": "evaluation",
    "config_for": "objectives",
    "evaluate_robustness": "evaluation",
    "export_onnx": "hub.export",
    "extract_adapter": "hub.extraction",
    "extract_for_accuracy": "hub.extraction",
    "get_autolora_model": "factory",
    "load_autolora_model": "factory",
    "verify_release": "hub.verification",
}

__all__ = [
    "PGD",
    "AutoLoraConfig",
    "AutoLoraModel",
    "AutoLoraTrainer",
    "AutoLoraTrainingArguments",
    "Preprocessing",
    "RobustnessReport",
    "ThreatModel",
    "TransferAttack",
    "config_for",
    "evaluate_robustness",
    "export_onnx",
    "extract_adapter",
    "extract_for_accuracy",
    "get_autolora_model",
    "load_autolora_model",
    "verify_release",
]


# Where timm is there already, it shall know our architectures at once; otherwise with the first use of this package.
if "timm" in sys.modules:
    import_module(".architectures", __name__)


# Type checkers have the imports above; with this function they would take any name for one of the package.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
