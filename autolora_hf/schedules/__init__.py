from .curves import Curve, constant, cosine, milestones
from .epsilon import EpsilonKind, EpsilonSchedule
from .learning_rate import HalvingRule, PlateauHalving, default_checkpoints, default_epochs
from .scalars import LossScalars, loss_scalars


SCHEDULES = ("plateau", "milestones", "cosine", "constant")

__all__ = [
    "SCHEDULES",
    "Curve",
    "EpsilonKind",
    "EpsilonSchedule",
    "HalvingRule",
    "LossScalars",
    "PlateauHalving",
    "constant",
    "cosine",
    "default_checkpoints",
    "default_epochs",
    "loss_scalars",
    "milestones",
]
