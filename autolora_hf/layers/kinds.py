"""The kinds of branch: what each is called, which layers it can sit on, what can be set, whether it can be merged.

`lora`, `lnlora`, `foura`, `efft` and `adakron` are layers of this package. The others are PEFT's own tuners, made by
its own machinery, so that stock PEFT loads what is saved of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..checks import Check, boolean, integer, number, one_of, optional
from .base import BranchLayer
from .efft import WeightEfft
from .foura import GatedFoura, WeightFoura
from .output import AdaKron, LNLora, OutputBranch, takes_patches
from .uses import Use, in_stock_peft, is_called
from .weight import WeightLora


_SHARE = number(0, 1)
_MOST = 65_536
# Fields of `LoraConfig` that shape a branch of plain LoRA. What a kind does not know must be left at its default.
LORA_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")


@dataclass(frozen=True)
class BranchKind:
    """One kind of branch.

    Args:
        name (`str`): What `AutoLoraConfig.branch` calls it.
        title (`str`): What its authors call it.
        fits (`Callable`): `(layer, use) -> bool`: whether it computes the right thing on a layer that is used so.
        where (`str`): The layers that it fits, in words.
        fields (`tuple[str, ...]`): The fields of `LORA_FIELDS` that it knows.
        arguments (`dict[str, Check]`): What `AutoLoraConfig.branch_args` may hold, with a check of each value.
        layer (`type[BranchLayer]`, *optional*): This package's layer; `None`: PEFT's.
        config (`type[PeftConfig]`): PEFT's configuration class.
        fixed (`dict`): Fields of that class that are always set.
        multiple (`int`): The rank must be a multiple of it.
        squares (`Callable`): `weight -> sides` of the square matrices that it makes for a weight.
    """

    name: str
    title: str
    fits: Callable[[nn.Module, Use], bool]
    where: str
    fields: tuple[str, ...] = ("r",)
    arguments: dict[str, Check] = field(default_factory=dict)
    layer: type[BranchLayer] | None = None
    config: type[PeftConfig] = LoraConfig
    fixed: dict[str, Any] = field(default_factory=dict)
    multiple: int = 1
    squares: Callable[[Tensor], tuple[int, ...]] = lambda weight: ()

    @property
    def is_pefts(self) -> bool:
        """Whether it is a tuner of PEFT's own."""
        return self.layer is None


def _anywhere(module: nn.Module, use: Use) -> bool:
    return use.any


def _plain_linear(module: nn.Module, use: Use) -> bool:
    return isinstance(module, nn.Linear) and in_stock_peft(module, use)


def _plain(module: nn.Module, use: Use) -> bool:
    # Not timm's "same" padded ones, whose padding is computed in their forward.
    return in_stock_peft(module, use) and (isinstance(module, nn.Linear) or type(module) is nn.Conv2d)


def _sequence_linear(module: nn.Module, use: Use) -> bool:
    # PEFT's rotation takes any input of four dimensions for that of a convolution.
    return _plain_linear(module, use) and use.dimensions != 4


def _ungrouped(module: nn.Module, use: Use) -> bool:
    plain = type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros"
    return is_called(module, use) and (isinstance(module, nn.Linear) or takes_patches(module) or plain)


def _linear(module: nn.Module, use: Use) -> bool:
    return is_called(module, use) and isinstance(module, nn.Linear)


def _inputs(weight: Tensor) -> tuple[int, ...]:
    return (math.prod(weight.shape[1:]),)


_ANYWHERE = "convolutions, linear layers and attention"
_LINEAR = "linear layers that are called"
_SEQUENCES = "linear layers that are called with N x tokens x channels"
_PLAIN = "linear layers and plain convolutions that are called"
_UNGROUPED = "linear layers and convolutions without groups that are called"
_SCALED = ("r", "lora_alpha", "use_rslora")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_RANK = integer(1, _MOST)


def _pefts(title: str, where: str = _PLAIN, name: str | None = None, **options: Any) -> BranchKind:
    name = name or title.lower()
    options.setdefault("config", cast(dict[str, Any], PEFT_TYPE_TO_CONFIG_MAPPING).get(name.upper()))
    fits = {_PLAIN: _plain, _LINEAR: _plain_linear, _SEQUENCES: _sequence_linear}[where]
    return BranchKind(name, title, fits, where, **options)


_LYCORIS = {
    "alpha": number(-1e6, 1e6),
    "rank_dropout": _SHARE,
    "module_dropout": _SHARE,
    "use_effective_conv2d": boolean,
}

BRANCHES: dict[str, BranchKind] = {
    kind.name: kind
    for kind in (
        BranchKind("lora", "LoRA", _anywhere, _ANYWHERE, fields=LORA_FIELDS, layer=WeightLora),
        BranchKind("lnlora", "LNLoRA", _ungrouped, _UNGROUPED, fields=(*_SCALED, *_PATTERNS), layer=LNLora),
        BranchKind(
            "foura",
            "FouRA",
            _anywhere,
            _ANYWHERE,
            fields=(*_SCALED, *_PATTERNS),
            arguments={"gate": optional(one_of("hard"))},
            layer=WeightFoura,
            squares=lambda weight: tuple(weight.shape[:2]),
        ),
        BranchKind("efft", "EFFT", _anywhere, _ANYWHERE, fields=_SCALED, layer=WeightEfft),
        BranchKind(
            "adakron",
            "AdaKron",
            is_called,
            "linear layers and convolutions that are called",
            fields=("r", "rank_pattern"),
            layer=AdaKron,
            multiple=AdaKron.SECOND,
        ),
        _pefts("DoRA", config=LoraConfig, fixed={"use_dora": True}, fields=LORA_FIELDS),
        _pefts("LoHa", arguments=_LYCORIS),
        _pefts(
            "LoKr",
            arguments={
                **_LYCORIS,
                "decompose_both": boolean,
                "decompose_factor": integer(-1, _MOST),
                "rank_dropout_scale": boolean,
            },
        ),
        # Starts at the identity in pairs of reflections.
        _pefts("HRA", arguments={"apply_GS": boolean}, multiple=2, squares=_inputs),
        _pefts("(IA)3", name="ia3", fixed={"feedforward_modules": []}, fields=()),
        _pefts("HiRA", arguments={"hira_dropout": _SHARE}),
        # PEFT's rotation of a convolution's input is not the identity at the start.
        _pefts(
            "OFT",
            _SEQUENCES,
            fields=(),
            arguments={
                "r": integer(0, _MOST),
                "oft_block_size": integer(0, _MOST),
                "module_dropout": _SHARE,
                "block_share": boolean,
                "use_cayley_neumann": boolean,
                "num_cayley_neumann_terms": integer(1, 64),
            },
            squares=_inputs,
        ),
        _pefts("MiSS", _LINEAR, arguments={"miss_dropout": _SHARE}),
        _pefts(
            "RoAd",
            _LINEAR,
            fields=(),
            arguments={"variant": one_of("road_1", "road_2", "road_4"), "group_size": integer(2, _MOST)},
        ),
    )
}
# PEFT's tuners that cannot be a branch, and why.
REFUSED = {
    "boft": "it keeps a matrix as large as the square of each layer's width, and computes something else where its "
    "CUDA extension cannot be built; `branch='oft'` is its case of one factor",
    "vera": "all layers share its random projections, which must be saved with each adapter",
    "vblora": "all layers share its vector bank, which PEFT makes for one adapter",
    "randlora": "all layers share its random bases, which must be saved with each adapter",
    "adalora": "it prunes ranks by calls that a training loop has to make",
    "fourierft": "it starts with a random change of the weights",
    "delora": "it saves the norms of the base's weights as if they were its own",
    "shira": "the places of its values are drawn anew when it is loaded",
    "c3a": "its blocks fit few layers of a vision model",
    "ln_tuning": "it trains the norms themselves; `modules_to_save` does that in mode 'adapter'",
}


def branch_kind(name: Any, arguments: dict[str, Any] | None = None) -> BranchKind:
    """The kind of that name, with that content of `AutoLoraConfig.branch_args`.

    Raises:
        ValueError: If there is none; for a tuner of PEFT's, with the reason.
    """
    if isinstance(name, str) and name in BRANCHES:
        kind = BRANCHES[name]
        if name == "foura" and (arguments or {}).get("gate"):
            return replace(kind, fits=_linear, where=_LINEAR, layer=GatedFoura)
        return kind
    options = ", ".join(map(repr, BRANCHES))
    if isinstance(name, str) and name in REFUSED:
        raise ValueError(f"PEFT's {name!r} cannot be a `branch`: {REFUSED[name]}. Possible are {options}.")
    raise ValueError(f"`branch` must be one of {options}, got {name!r}.")


def can_merge(layer: BaseTunerLayer, adapters: list[str]) -> bool:
    """Whether the weight with `adapters` merged into it, in this order, computes what the branch layer does."""
    if isinstance(layer, OutputBranch):
        return False
    # PEFT rotates the input by one adapter after the other, but merges them in the opposite order.
    return not (isinstance(layer, OFTLayer) and len(adapters) > 1)
