from .autolora import AutoLora
from .base import Batch, Objective, ObjectiveOutput
from .natural import NaturalFineTuning


OBJECTIVES: dict[str, type[Objective]] = {"autolora": AutoLora, "natural": NaturalFineTuning}

__all__ = ["OBJECTIVES", "AutoLora", "Batch", "NaturalFineTuning", "Objective", "ObjectiveOutput"]
