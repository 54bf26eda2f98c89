from .pgd import PGD, attack_mode
from .precision import bf16_keeps_strength


__all__ = ["PGD", "attack_mode", "bf16_keeps_strength"]
