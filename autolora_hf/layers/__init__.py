from .weight import WeightLora, fold_factors, unfold_factors, weight_name


__all__ = ["WeightLora", "fold_factors", "unfold_factors", "weight_name"]
