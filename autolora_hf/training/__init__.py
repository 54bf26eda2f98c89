from .arguments import AutoLoraTrainingArguments
from .trainer import AutoLoraTrainer


__all__ = ["AutoLoraTrainer", "AutoLoraTrainingArguments"]
