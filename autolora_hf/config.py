"""Configuration objects: the threat model and the AutoLoRa adapter configuration."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Any, Literal, get_args

from peft import LoraConfig

from .layers import LORA_FIELDS, BranchKind, branch_kind


Norm = Literal["linf", "l2", "l1"]
# For each norm its usual spelling and the largest sensible radius. The unit square's diagonal bounds L2 by
# sqrt(C*H*W); 16 already is twice the radius of anything published at 224 px, while 8-bit radii (e.g. 128) start
# there. L1 goes up to 255 at 224 px (Croce and Hein, ICML 2021), and its 8-bit radii start at 12 * 255.
_NORMS = {"linf": ("Linf", 1), "l2": ("L2", 16), "l1": ("L1", 1024)}

# Fields of `AutoLoraConfig` that stock PEFT does not know. They live in `autolora_config.json`, so that
# `adapter_config.json` stays a plain configuration of PEFT's.
AUTOLORA_FIELDS = ("mode", "branch", "branch_args", "layout", "norm", "head", "natural_route", "stop_gradient")


class PixelRadius(float):
    """A float that also reads `"8/255"`, as one writes it on a command line."""

    def __new__(cls, value: Any) -> PixelRadius:
        try:
            return super().__new__(cls, Fraction(value) if isinstance(value, str) else value)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"A radius must be a number such as 0.03 or 8/255, got {value!r}.") from error


def radius_argument(text: str) -> PixelRadius:
    """[`PixelRadius`] as a type of `argparse`, which shows the message of an error of its own kind only."""
    try:
        return PixelRadius(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True)
class ThreatModel:
    """The set of perturbations an adversary may choose from: a norm ball around each image, cut with [0, 1].

    Args:
        norm (`str`): `"linf"` (largest change of a pixel value), `"l2"` (Euclidean length of the change) or `"l1"`
            (sum of all changes).
        eps (`float`): Radius of the ball in units of [0, 1] pixels, so the usual "8" of 8-bit images is `8/255`.

    Raises:
        ValueError: If the norm is unknown, or `eps` is not a positive finite number or is implausibly large; the
            message suggests the likely meaning.
    """

    norm: Norm = field(default="linf", metadata={"help": "Norm of the perturbation: 'linf', 'l2' or 'l1'."})
    eps: float = field(default=8 / 255, metadata={"help": "Radius of the ball, in units of [0, 1] pixels."})

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"`norm` must be 'linf', 'l2' or 'l1', got {self.norm!r}.")
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not math.isfinite(self.eps):
            raise ValueError(f"`eps` must be a finite number in units of [0, 1] pixels, got {self.eps!r}.")
        if self.eps < 0:
            raise ValueError(f"`eps` must be positive, got {self.eps}. Did you mean {-self.eps}?")
        if self.eps == 0:
            raise ValueError(
                "`eps` is 0, which allows no perturbation: accuracy under it is natural accuracy, which "
                "`evaluate_robustness` reports anyway. A common value for colour images is 8/255."
            )
        limit = self.largest_eps
        if self.eps > limit:
            raise ValueError(
                f"`eps` is {self.eps:g}, but pixels are in [0, 1] and the largest sensible {self.norm} radius is "
                f"{limit}. Did you mean {self.eps:g}/255 = {self.eps / 255:.5f}?"
            )

    @property
    def largest_eps(self) -> float:
        """The largest radius of this norm that is taken for one in [0, 1] pixels."""
        return _NORMS[self.norm][1]

    @property
    def norm_name(self) -> str:
        """The norm as papers and attack libraries spell it, such as "Linf"."""
        return _NORMS[self.norm][0]

    def __str__(self) -> str:
        name = self.norm_name
        scaled = self.eps * 255
        if self.norm == "linf" and abs(scaled - round(scaled)) < 1e-6:
            return f"{name}, eps = {round(scaled)}/255"
        return f"{name}, eps = {self.eps:.4g}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class AutoLoraConfig(LoraConfig):
    """Configuration of [`AutoLoraModel`]: a `LoraConfig` with the choices that AutoLoRa adds.

    Every field of `LoraConfig` that concerns plain LoRA (`r`, `lora_alpha`, `lora_dropout`, `init_lora_weights`,
    `rank_pattern`, ...) means what it means in PEFT and applies to each branch. On disk an adapter is a plain LoRA
    adapter; the fields below are kept in `autolora_config.json`.

    Args:
        mode (`str`): What the robust route trains. `"full"` (the paper): the whole backbone and the head, with a LoRA
            branch for the natural route. `"adapter"`: the backbone stays frozen; a `robust` LoRA adapter, the head and
            the BatchNorm layers train, with a second LoRA branch on top for the natural route.
        branch (`str`): Kind of every branch. `"lora"`; `"lnlora"` (FullLoRA-AT: LoRA of a LayerNorm of the input);
            `"foura"` (LoRA in the frequency domain of the channels); `"efft"` (factors that layers share);
            `"adakron"` (an adapter after the MLP of each block); or one of PEFT's tuners: `"dora"`, `"loha"`,
            `"lokr"`, `"hra"`, `"ia3"`, `"hira"`, `"oft"`, `"miss"`, `"road"`. See `docs/methods.md`.
        branch_args (`dict`, *optional*): Further fields of that kind: for PEFT's those of its configuration class,
            such as `{"alpha": 16}` for `"loha"`; `{"gate": "hard"}` for `"foura"`.
        layout (`str`, *optional*): Factorisation of a LoRA branch. `"released"` is the one of the paper's code, `dW =
            reshape(B A) * lora_alpha / r` with `A` of shape `r k x c_in k`, `B` of `c_out k x r k` and `A ~ N(0, 1)`.
            `"peft"` is PEFT's own (for convolutions: k x k to `r` channels, then 1 x 1). `None`: `"released"` in mode
            `full`, `"peft"` in mode `adapter`, whose adapter then is no larger than it must be.
        norm (`str`): What the two routes share of BatchNorm layers. `"shared"` (the paper): everything.
            `"robust_stats"`: the natural route normalises with batch statistics but leaves the running ones alone.
            `"dual"`: one set for each route; the natural set keeps its affine parameters. `"split"` (AR-AT, ICLR
            2025): one set for each route, and both train theirs. `"frozen"` (TWINS, CVPR 2023): the natural route
            normalises with the checkpoint's running statistics, in training too, and trains affine parameters of its
            own.
        natural_route (`str`): What the natural route adds to the robust one. `"branch"` (the paper): a branch of its
            own. `"plain"`: nothing but its norms. `"none"`: there is no natural route, as for objectives that train
            the robust one alone.
        stop_gradient (`bool`): Whether the natural route's gradient stops at the backbone, so that it trains its own
            branch and the head only (the paper), or also reaches the weights it shares with the robust route.
        head (`str` or `list[str]`, *optional*): Name of the classification layer, or of several (distilled models).
            `None`: found by following the logits backwards.
        lora_alpha (`int`, *optional*): Scale of the branch is `lora_alpha / r`. `None`: 1 for LoRA in mode `full` (the
            paper); else `2 r`, as in mode `adapter`, where the branch has to carry the whole change of the backbone.
        target_modules (`str` or `list[str]`, *optional*): Layers that get a branch, by name or end of name; a string
            is a regular expression for whole names, or `"all-linear"`: every linear layer but the head. `"all"`: every
            convolution and linear layer inside the repeated blocks; never the stem or the head (as in the paper).
            `None`: the same in mode `full`; in mode `adapter` those among them for which PEFT has an exact LoRA layer
            (all but grouped, dilated and weight-standardised convolutions and weights that are used past their layer),
            so that the adapter loads without this package, unless they hold less than half of the weights. Kinds of
            branch that fit only some layers sit on those; `"lnlora"` also on the patch embedding, `"adakron"` on the
            last layer of each MLP.
        modules_to_save (`list[str]`, *optional*): Mode `adapter`: further modules, such as LayerNorms, that train and
            are saved whole with the robust adapter, by name or end of name. The head and every layer with running
            statistics are, anyway.
    """

    mode: Literal["full", "adapter"] = field(
        default="full", metadata={"help": "'full' trains the backbone, 'adapter' a LoRA adapter on a frozen one."}
    )
    branch: str = field(
        default="lora",
        metadata={"help": "Kind of branch: lora, lnlora, foura, efft, adakron, or a tuner of PEFT's such as dora."},
    )
    branch_args: dict[str, Any] | None = field(
        default=None, metadata={"help": "Further fields of that kind of branch, such as those of PEFT's LoHaConfig."}
    )
    layout: Literal["released", "peft"] | None = field(
        default=None, metadata={"help": "Factorisation of the branch: 'released' (the paper's code) or 'peft'."}
    )
    norm: Literal["shared", "robust_stats", "dual", "split", "frozen"] = field(
        default="shared",
        metadata={"help": "What the two routes share of BatchNorm: shared, robust_stats, dual, split or frozen."},
    )
    natural_route: Literal["branch", "plain", "none"] = field(
        default="branch",
        metadata={"help": "What the natural route adds: branch, plain (only norms) or none (no route)."},
    )
    stop_gradient: bool = field(
        default=True, metadata={"help": "Whether the natural route's gradient stops at the shared backbone."}
    )
    head: str | list[str] | None = field(
        default=None, metadata={"help": "Name of the classification layer(s); found by itself when left out."}
    )
    lora_alpha: int | None = field(  # type: ignore[assignment]  # filled in by `__post_init__`
        default=None, metadata={"help": "Scale of the branch is lora_alpha / r."}
    )

    def __post_init__(self) -> None:
        for name, allowed in (
            ("mode", ("full", "adapter")),
            ("layout", ("released", "peft", None)),
            ("norm", ("shared", "robust_stats", "dual", "split", "frozen")),
            ("natural_route", ("branch", "plain", "none")),
        ):
            if getattr(self, name) not in allowed:
                options = ", ".join(repr(option) for option in allowed if option)
                raise ValueError(f"`{name}` must be one of {options}, got {getattr(self, name)!r}.")
        kind = branch_kind(self.branch)
        self._check_arguments(kind)
        of_paper = self.branch == "lora" and self.mode == "full"
        if self.layout is None:
            self.layout = "released" if of_paper else "peft"
        if self.lora_alpha is None:
            self.lora_alpha = 1 if of_paper else 2 * self.r
        super().__post_init__()
        self._check_fields(kind)
        self._refuse_unsupported()
        if self.natural_route == "none" and self.norm != "shared":
            raise ValueError(
                f"`norm={self.norm!r}` is about what the natural route shares with the robust one, but "
                "`natural_route='none'` leaves it out."
            )
        if self.natural_route == "none" and not self.stop_gradient:
            raise ValueError(
                "`stop_gradient=False` is about the natural route, but `natural_route='none'` leaves it out."
            )
        if not self.has_branches and self.branch != "lora":
            raise ValueError(
                f"`branch={self.branch!r}` would have no effect: with `mode='full'` and `natural_route="
                f"{self.natural_route!r}` there is no branch. Use `mode='adapter'` (`--mode adapter`)."
            )
        if not self.has_branches and self.target_modules:
            raise ValueError(
                f"`target_modules` names layers that get a branch, but with `mode='full'` and `natural_route="
                f"{self.natural_route!r}` there is none."
            )

    def _check_arguments(self, kind: BranchKind) -> None:
        if not isinstance(self.branch_args, (dict, type(None))):
            raise ValueError(f"`branch_args` must be a dictionary, got {self.branch_args!r}.")
        arguments = dict(self.branch_args or {})
        if "r" in arguments and "r" in kind.fields:
            # The rank has one place.
            self.r = arguments.pop("r")
        unknown = sorted(map(str, arguments.keys() - kind.arguments.keys()))
        if unknown:
            raise ValueError(
                f"`branch_args` of branch {kind.name!r} cannot have {', '.join(map(repr, unknown[:5]))}. Possible: "
                f"{', '.join(map(repr, kind.arguments)) or 'none'}."
            )
        for name, value in arguments.items():
            kind.arguments[name](value, f"branch_args.{name}")
        self.branch_args = arguments
        if "r" in kind.fields and (isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1):
            raise ValueError(f"`r` must be a positive integer, got {self.r!r}.")

    def _check_fields(self, kind: BranchKind) -> None:
        """Raises `ValueError` for a field of plain LoRA that this kind of branch does not have."""
        defaults = {name: LoraConfig.__dataclass_fields__[name].default for name in LORA_FIELDS}
        defaults |= {"rank_pattern": {}, "alpha_pattern": {}, "lora_alpha": 2 * self.r}
        changed = [name for name in LORA_FIELDS if name not in kind.fields and getattr(self, name) != defaults[name]]
        if self.branch != "lora" and self.layout != "peft":
            changed.append("layout")
        if changed:
            raise ValueError(
                f"`{changed[0]}={getattr(self, changed[0])!r}` means nothing to branch {kind.name!r}. What can be "
                f"set: {', '.join(f'`{name}`' for name in kind.fields) or 'no field of LoRA'}, and in `branch_args` "
                f"{', '.join(map(repr, kind.arguments)) or 'nothing'}."
            )
        ranks = [self.r, *(self.rank_pattern or {}).values()] if "r" in kind.fields else []
        odd = [rank for rank in ranks if rank % kind.multiple]
        if odd:
            raise ValueError(
                f"The rank of branch {kind.name!r} must be a multiple of {kind.multiple}, got r={odd[0]}."
            )

    def _refuse_unsupported(self) -> None:
        refused = {
            "bias": self.bias != "none",
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "layer_replication": self.layer_replication is not None,
            "target_parameters": self.target_parameters is not None,
            "trainable_token_indices": self.trainable_token_indices is not None,
            "init_lora_weights": self.init_lora_weights not in (True, False, "gaussian"),
        }
        bad = [name for name, is_set in refused.items() if is_set]
        if self.use_dora:
            raise ValueError("AutoLoraConfig does not support `use_dora=True`: use `branch='dora'`.")
        if bad:
            raise ValueError(
                f"AutoLoraConfig does not support {', '.join(f'`{name}={getattr(self, name)!r}`' for name in bad)}: "
                "the two routes are only defined for plain LoRA."
            )
        if self.modules_to_save and self.mode == "full":
            raise ValueError(
                f"`modules_to_save={list(self.modules_to_save)}` needs `mode='adapter'`: in mode 'full' everything "
                "trains and is saved. Use `head` to name the classification layer."
            )
        if self.layout == "released" and self.init_lora_weights is not True:
            raise ValueError(
                f"`init_lora_weights={self.init_lora_weights!r}` needs `layout='peft'`: the released layout starts "
                "with A ~ N(0, 1) and B = 0, as in the paper's code."
            )
        if self.layout == "released" and self.lora_dropout:
            raise ValueError(
                f"`lora_dropout={self.lora_dropout}` needs `layout='peft'`: the released layout is a change of the "
                "weight, which has no input of its own to drop from."
            )

    @property
    def kind(self) -> BranchKind:
        """The kind of every branch."""
        return branch_kind(self.branch, self.branch_args)

    @property
    def has_branches(self) -> bool:
        """Whether any route runs with a branch."""
        return self.mode == "adapter" or self.natural_route == "branch"

    @property
    def heads(self) -> list[str]:
        """Names of the classification layers, once they are resolved."""
        return [self.head] if isinstance(self.head, str) else list(self.head or ())

    def lora_config(self, **changes: Any) -> LoraConfig:
        """A stock `LoraConfig` of one branch: this configuration without the AutoLoRa fields, with `changes`."""
        fields = {
            name: value
            for name, value in vars(self).items()
            if name not in (*AUTOLORA_FIELDS, "modules_to_save") and name in LoraConfig.__dataclass_fields__
        }
        return LoraConfig(**{**fields, **changes})
