from .base import Finisher
from .rift import RiFT


FINISHERS: dict[str, type[Finisher]] = {"none": Finisher, "rift": RiFT}

__all__ = ["FINISHERS", "Finisher", "RiFT"]
