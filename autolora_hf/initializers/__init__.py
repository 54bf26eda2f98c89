from .base import Initializer
from .heads import AdversarialLinearProbe, LinearProbe, ZeroHead


INITIALIZERS: dict[str, type[Initializer]] = {
    "none": Initializer,
    "zero-head": ZeroHead,
    "linear-probe": LinearProbe,
    "adversarial-linear-probe": AdversarialLinearProbe,
}

__all__ = ["INITIALIZERS", "AdversarialLinearProbe", "Initializer", "LinearProbe", "ZeroHead"]
