from .base import BranchLayer, branch_parameters, stock_names, weight_name
from .efft import WeightEfft, share_factors
from .foura import GatedFoura, WeightFoura, dct_matrix
from .kinds import BRANCHES, LORA_FIELDS, BranchKind, branch_kind, can_merge
from .merging import merged_tensors
from .norms import fix_statistics
from .output import AdaKron, LNLora, OutputBranch, RankGate, patches_of, takes_patches
from .uses import Use, in_stock_peft
from .weight import WeightBranch, WeightLora, fold_factors, unfold_factors


__all__ = [
    "BRANCHES",
    "LORA_FIELDS",
    "AdaKron",
    "BranchKind",
    "BranchLayer",
    "GatedFoura",
    "LNLora",
    "OutputBranch",
    "RankGate",
    "Use",
    "WeightBranch",
    "WeightEfft",
    "WeightFoura",
    "WeightLora",
    "branch_kind",
    "branch_parameters",
    "can_merge",
    "dct_matrix",
    "fix_statistics",
    "fold_factors",
    "in_stock_peft",
    "merged_tensors",
    "patches_of",
    "share_factors",
    "stock_names",
    "takes_patches",
    "unfold_factors",
    "weight_name",
]
