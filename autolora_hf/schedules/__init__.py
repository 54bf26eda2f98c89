from .learning_rate import PlateauHalving, default_checkpoints, default_epochs
from .scalars import LossScalars, loss_scalars


__all__ = ["LossScalars", "PlateauHalving", "default_checkpoints", "default_epochs", "loss_scalars"]
