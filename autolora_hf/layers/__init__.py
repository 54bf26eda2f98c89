from .released import ReleasedLora, fold_factors, unfold_factors


__all__ = ["ReleasedLora", "fold_factors", "unfold_factors"]
