from .pgd import PGD, attack_mode


__all__ = ["PGD", "attack_mode"]
