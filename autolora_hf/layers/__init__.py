from .weight import WeightLora, factor, fold_factors, unfold_factors, weight_name


__all__ = ["WeightLora", "factor", "fold_factors", "unfold_factors", "weight_name"]
