from .norms import fix_statistics
from .weight import WeightLora, factor, fold_factors, unfold_factors, weight_name


__all__ = ["WeightLora", "factor", "fix_statistics", "fold_factors", "unfold_factors", "weight_name"]
