"""What an objective is: a weighted sum of terms over routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor

from ..attacks.pgd import AttackLoss
from ..checks import listed
from ..routes import ROBUST
from ..schedules import LossScalars
from ..towers import advice, tower_of


if TYPE_CHECKING:
    from ..modeling import AutoLoraModel


class RouteForward(Protocol):
    """Runs a route, with that route's gradient mask, on pixels in [0, 1]."""

    def __call__(self, route: str, pixels: Tensor) -> Tensor:
        """Logits, N x K."""

    def with_features(self, route: str, pixels: Tensor, layers: Sequence[str] = ()) -> tuple[Tensor, list[Tensor]]:
        """Logits and, in the same pass, the pooled outputs of `layers`, each N x D; see [`pooled`].

        Without layers: what the classification layer gets.
        """


# What to do about a model that does not fit an objective.
ADVICE = (
    "Leave the routes to the objective: give the trainer the backbone itself (on the command line, leave out --norm, "
    "--natural-route and --stop-gradient), or make the model with `config_for(objective, backbone)`."
)


@dataclass(frozen=True)
class Batch:
    """Clean images, their adversarial versions and labels.

    Shapes: N x 3 x H x W in [0, 1], the same, and N. `reference` is what [`Objective.reference`] gave for the images.
    An objective that does not ask for adversarial images, by `needs_adversarial`, finds `None` in their place.
    """

    pixels: Tensor
    adversarial: Tensor
    labels: Tensor
    reference: Tensor | None = None


@dataclass(frozen=True)
class ObjectiveOutput:
    """The loss to minimise, and its terms (detached scalars) for the log."""

    loss: Tensor
    terms: dict[str, Tensor]


class Objective:
    """A training objective. Subclasses are dataclasses: their fields are options of `objective_kwargs`.

    All that the trainer knows of a method stands here; it never asks which one it is.

    Attributes:
        description (`str`): What model cards say about it, in Markdown, with its source; `{branch}` stands for the
            kind of the branches.
        routes (`tuple[str, ...]`): Routes that the loss runs. Parameters that none of them uses do not train.
        config (`dict`): The fields of `AutoLoraConfig` that the method is about, for [`config_for`].
        heads_only (`bool`): Only the classification layers train, and all else is in eval mode.
        needs_adversarial (`bool`): Whether the trainer runs the attack.
        uses_scalars (`bool`): Whether the trainer measures the natural route's training accuracy for the loss scalars.
        scalars (`tuple[str, ...]`): Those of the loss scalars that it has, for the log.
        classifies (`bool`): Whether the outputs are logits of the labels. If not, it trains image towers, on images
            whose labels are not looked at and may be missing, and validation measures the objective's own [`losses`]
            instead of accuracies.
        selection_metric (`str`): Validation metric that the schedule and the choice of the best weights go by.
        attack_loss (`str`): What the attack maximises, see [`PGD`].
        schedule (`str`): Learning-rate schedule where `schedule` is left open.
        milestones (`tuple[float, ...]`): Shares of the run after which `"milestones"` divides the learning rate by 10.
        warmup (`float`): Share of the run in which `"cosine"` rises, where the arguments ask for no warm-up.
        learning_rate (`float`, *optional*): Learning rate in mode `full` where it is left open and the method has a
            published one for fine-tuning; else the package's own.
        optimizer (`str`, *optional*): Optimizer in mode `full`, likewise.
        steps (`int`, *optional*): Optimizer steps of the published training: where the number of epochs is left open,
            the package's own gives way to what they make, if that is less.
    """

    description: ClassVar[str] = ""
    routes: ClassVar[tuple[str, ...]] = (ROBUST,)
    config: ClassVar[dict[str, Any]] = {"natural_route": "none"}
    heads_only: ClassVar[bool] = False
    needs_adversarial: ClassVar[bool] = True
    uses_scalars: bool = False
    scalars: ClassVar[tuple[str, ...]] = ("lambda1", "lambda2")
    classifies: ClassVar[bool] = True
    selection_metric: ClassVar[str] = "robust_accuracy"
    attack_loss: AttackLoss = "ce"
    schedule: ClassVar[str] = "milestones"
    milestones: ClassVar[tuple[float, ...]] = (1 / 2, 5 / 6)
    warmup: ClassVar[float] = 0.0
    learning_rate: ClassVar[float | None] = None
    optimizer: ClassVar[str | None] = None
    steps: ClassVar[int | None] = None

    def prepare(self, model: AutoLoraModel, seed: int) -> None:
        """Called once, before the optimizer is made: checks that the model fits, makes what trains along with it.

        Args:
            model (`AutoLoraModel`): Modules that train along go into `model.auxiliary`.
            seed (`int`): Of what is drawn at random.

        Raises:
            ValueError: If the model lacks a route or has the wrong norms, or its outputs are not of the right kind.
        """
        if self.classifies and tower_of(model) is not None:
            raise ValueError(
                f"{type(self).__name__} needs logits of classes, but a {model.backbone['architecture']} gives "
                "embeddings. Use an objective without labels ('fare', 'sim-clip'), or a classifier: for the name of a "
                "checkpoint of CLIP, `get_autolora_model(name, num_classes=...)` makes one."
            )
        if not self.classifies and tower_of(model) is None:
            raise ValueError(
                f"{type(self).__name__} trains the embeddings of an image tower, but a "
                f"{model.backbone['architecture']} gives logits of classes. {advice()} For a classifier use an "
                "objective with labels, such as 'autolora' or 'trades'."
            )
        missing = [route for route in self.routes if route not in model.routes]
        if missing:
            raise ValueError(
                f"{type(self).__name__} runs the {' and '.join(self.routes)} routes, but this model has no "
                f"{listed(missing)} one (`natural_route={model.autolora_config.natural_route!r}`). " + ADVICE
            )

    def describe(self) -> dict[str, Any]:
        """What the training plan is to say of it besides its options, once it is prepared."""
        return {}

    def reference(self, pixels: Tensor) -> Tensor | None:
        """What the attack moves away from and the loss draws near to, N x D; `None` if there is no such thing."""
        return None

    def losses(self, outputs: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
        """Validation loss of every image, N, of the deployed route's outputs, N x K, for adversarial images."""
        return F.cross_entropy(outputs, labels, reduction="none")

    def adversarial_term(self, clean: Tensor, robust: Tensor, labels: Tensor, scalars: LossScalars) -> Tensor:
        """The part of the loss that looks at adversarial images, a scalar, for diagnoses: what remains is natural.

        Terms of features are left out.

        Args:
            clean (`Tensor`): Logits of the clean images, N x K.
            robust (`Tensor`): Logits of the adversarial images by the deployed route, N x K.
            labels (`Tensor`): Class indices, N.
            scalars (`LossScalars`): The loss scalars in force.
        """
        return F.cross_entropy(robust, labels)

    def __call__(self, forward: RouteForward, batch: Batch, scalars: LossScalars) -> ObjectiveOutput:
        raise NotImplementedError


def pooled(output: Tensor) -> Tensor:
    """One vector an image, N x D: the mean over places of a feature map N x D x H x W or of tokens N x T x D."""
    if output.ndim == 4:
        return output.mean(dim=(2, 3))
    return output.mean(dim=1) if output.ndim == 3 else output
