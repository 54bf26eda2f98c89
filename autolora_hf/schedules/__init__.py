from .curves import Curve, constant, cosine, milestones
from .epsilon import EpsilonSchedule
from .learning_rate import PlateauHalving, default_checkpoints, default_epochs
from .scalars import LossScalars, loss_scalars


SCHEDULES = ("plateau", "milestones", "cosine", "constant")

__all__ = [
    "SCHEDULES",
    "Curve",
    "EpsilonSchedule",
    "LossScalars",
    "PlateauHalving",
    "constant",
    "cosine",
    "default_checkpoints",
    "default_epochs",
    "loss_scalars",
    "milestones",
]
