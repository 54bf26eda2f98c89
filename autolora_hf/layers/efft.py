"""EFFT (Chen 2023, arXiv 2311.06749): a change of the weights whose factors all layers of a shape share.

The weight of a layer, `c_out` rows of `c_in k k` values, changes by `s U C V`, `s = lora_alpha / r`. `U`, of as many
rows as its smaller side, and `V`, of as many columns as its larger one, are the same for all layers of these sides;
where the rows are the larger side the product is transposed, so that the two layers of an MLP share a pair. The core
`C`, `r x r`, is the same for layers whose names differ in numbers alone: one for the queries of all blocks, say.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from .weight import WeightBranch


class WeightEfft(WeightBranch):
    """One layer of EFFT; it has factors of its own until [`share_factors`] makes them those of its kind.

    `V` starts at zero, `U` and `C` with Glorot and Bengio's (2010) uniform initialisation.
    """

    adapter_layer_names = ("lora_U", "lora_C", "lora_V")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        self._scale(adapter_name, r, lora_alpha, config)
        weight, (small, large) = self._base_weight, sorted(self.sides)
        self.lora_U[adapter_name] = nn.Parameter(weight.new_empty(small, r))
        self.lora_C[adapter_name] = nn.Parameter(weight.new_empty(r, r))
        self.lora_V[adapter_name] = nn.Parameter(weight.new_zeros(r, large))
        nn.init.xavier_uniform_(self.lora_U[adapter_name])
        nn.init.xavier_uniform_(self.lora_C[adapter_name])
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the weight as a matrix: `c_out` and `c_in k k`."""
        weight = self._base_weight
        return weight.shape[0], weight[0].numel()

    def get_delta_weight(self, adapter: str) -> Tensor:
        delta = self.lora_U[adapter] @ self.lora_C[adapter] @ self.lora_V[adapter] * self.scaling[adapter]
        rows, columns = self.sides
        return (delta.T if rows > columns else delta).reshape(self._base_weight.shape)


def kind_of_layer(name: str) -> str:
    """The name without numbers: `blocks.3.mlp.fc1` and `blocks.7.mlp.fc1` are both `blocks.mlp.fc1`."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def share_factors(layers: dict[str, WeightEfft], adapter: str) -> None:
    """Makes the layers of a kind use the very same parameters, those of the first of them.

    Copies made by `copy.deepcopy` share them again, and `parameters()` counts them once.

    Args:
        layers (`dict[str, WeightEfft]`): By name in the model; each has the adapter.
        adapter (`str`): Name of the adapter.
    """
    factors: dict[tuple[int, ...], WeightEfft] = {}
    cores: dict[tuple[Any, ...], WeightEfft] = {}
    for name, layer in layers.items():
        rows, columns = layer.sides
        shape = tuple(sorted(layer.sides))
        owner = factors.setdefault(shape, layer)
        core = cores.setdefault((shape, rows > columns, kind_of_layer(name)), layer)
        layer.lora_U[adapter], layer.lora_V[adapter] = owner.lora_U[adapter], owner.lora_V[adapter]
        layer.lora_C[adapter] = core.lora_C[adapter]
