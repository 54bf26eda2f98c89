from typing import Any

from ..config import AutoLoraConfig
from .ar_at import AsymmetricRegularization
from .autolora import AutoLora
from .base import Batch, Objective, ObjectiveOutput
from .mart import Mart
from .natural import NaturalFineTuning, StandardLinearFineTuning
from .pgd_at import AdversarialLinearFineTuning, AdversarialTraining
from .trades import Trades
from .twins import TwinsAT, TwinsTrades


OBJECTIVES: dict[str, type[Objective]] = {
    "autolora": AutoLora,
    "natural": NaturalFineTuning,
    "slf": StandardLinearFineTuning,
    "pgd-at": AdversarialTraining,
    "alf": AdversarialLinearFineTuning,
    "trades": Trades,
    "mart": Mart,
    "twins-at": TwinsAT,
    "twins-trades": TwinsTrades,
    "ar-at": AsymmetricRegularization,
}


def config_for(objective: str, has_statistics: bool = True, **changes: Any) -> AutoLoraConfig:
    """The configuration of a model that is to be trained with `objective`: which routes, which norms, which gradients.

    Args:
        objective (`str`): A name in `OBJECTIVES`.
        has_statistics (`bool`): Whether the network has norms with running statistics (BatchNorm). If not, an
            objective for which a set of norms for each route is only a part keeps the one set there is.
        **changes: Further fields of [`AutoLoraConfig`], which also replace those of the objective.

    Raises:
        ValueError: If there is no such objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {objective!r}.")
    fields = {**OBJECTIVES[objective].config, **changes}
    if fields.get("norm") == "split" and not has_statistics:
        fields["norm"] = "shared"
    return AutoLoraConfig(**fields)


__all__ = [
    "OBJECTIVES",
    "AdversarialLinearFineTuning",
    "AdversarialTraining",
    "AsymmetricRegularization",
    "AutoLora",
    "Batch",
    "Mart",
    "NaturalFineTuning",
    "Objective",
    "ObjectiveOutput",
    "StandardLinearFineTuning",
    "Trades",
    "TwinsAT",
    "TwinsTrades",
    "config_for",
]
