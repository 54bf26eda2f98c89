"""What the page shows of one image: answers, attacks on each model, and what they do to the other models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attacks import PGD, attack_mode
from ..config import Norm, ThreatModel
from ..pixels import check_pixels


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model says of one image.

    Args:
        probabilities (`Tensor`): Softmax of its logits, K, on the CPU.
    """

    probabilities: Tensor

    @property
    def label(self) -> int:
        """The class with the largest probability."""
        return int(self.probabilities.argmax())

    @property
    def confidence(self) -> float:
        """The probability of that class."""
        return float(self.probabilities.max())

    def probability(self, label: int) -> float:
        """The probability of one class."""
        return float(self.probabilities[label])


@dataclass(frozen=True, eq=False)
class Attacked:
    """One model, attacked with full knowledge of it.

    Args:
        clean (`Answer`): To the image as it was.
        adversarial (`Tensor`): The image that the attack found, 3 x H x W, on the CPU.
        answer (`Answer`): To that image.
        others (`dict[str, Answer]`): What the other models say of it, by their name.
    """

    clean: Answer
    adversarial: Tensor
    answer: Answer
    others: dict[str, Answer]

    @property
    def is_fooled(self) -> bool:
        """Whether the attack changed the model's answer."""
        return self.answer.label != self.clean.label


@dataclass(frozen=True, eq=False)
class Outcome:
    """One image under attack.

    Args:
        pixels (`Tensor`): The image, 3 x H x W in [0, 1], on the CPU.
        norm (`str`): Norm of the threat model.
        eps (`float`): Its radius in [0, 1] pixels; 0 without an attack.
        attacked (`dict[str, Attacked]`): By the name of the model.
    """

    pixels: Tensor
    norm: Norm
    eps: float
    attacked: dict[str, Attacked]

    def is_fooled_by(self, name: str, source: str) -> bool:
        """Whether the image made against the model `source` changes the answer of the model `name`."""
        return self.attacked[source].others[name].label != self.attacked[name].clean.label


@dataclass(frozen=True)
class CurvePoint:
    """What one model says under an attack of one radius.

    Args:
        eps (`float`): The radius; 0 without an attack.
        label (`int`): The answer.
        confidence (`float`): Its probability.
        clean_probability (`float`): The probability that is left of the answer to the clean image.
        is_fooled (`bool`): Whether the answer is another one than to the clean image.
    """

    eps: float
    label: int
    confidence: float
    clean_probability: float
    is_fooled: bool

    @classmethod
    def of(cls, eps: float, attacked: Attacked) -> CurvePoint:
        """The point of an attack of radius `eps`."""
        answer, clean = attacked.answer, attacked.clean.label
        return cls(eps, answer.label, answer.confidence, answer.probability(clean), attacked.is_fooled)


def attack_image(
    models: dict[str, nn.Module], pixels: Tensor, norm: Norm, eps: float, *, steps: int = 20, seed: int = 0
) -> Outcome:
    """Attacks every model on its own with PGD, to change the answer that it gives to the clean image.

    What is true of the image is not asked: a visitor's image has no label. The models are left as they were, and equal
    calls give equal results.

    Args:
        models (`dict[str, nn.Module]`): Name to a map of pixels in [0, 1], N x 3 x H x W, to logits of the same K
            classes.
        pixels (`Tensor`): One image, 3 x H x W in [0, 1].
        norm (`str`): Norm of the threat model.
        eps (`float`): Its radius in [0, 1] pixels. 0: no attack; the image and the answers are those without one.
        steps (`int`): Steps of PGD.
        seed (`int`): Of its random start.

    Raises:
        ValueError: If the image, the norm or the radius is wrong.
    """
    check_pixels(pixels[None])
    search = PGD(ThreatModel(norm, eps), steps=steps, seed=seed) if eps != 0 else None
    found: dict[str, Tensor] = {}
    clean: dict[str, Answer] = {}
    for name, model in models.items():
        image, clean[name] = pixels[None].to(_device(model)), _answer(model, pixels)
        labels = torch.tensor([clean[name].label], device=image.device)
        found[name] = pixels if search is None else search(model, image, labels)[0].cpu()
    attacked = {}
    for source, image in found.items():
        answers = {name: clean[name] if search is None else _answer(model, image) for name, model in models.items()}
        attacked[source] = Attacked(clean[source], image, answers.pop(source), answers)
    return Outcome(pixels, norm, float(eps), attacked)


def answers_by_radius(
    models: dict[str, nn.Module],
    pixels: Tensor,
    norm: Norm,
    radii: Sequence[float],
    *,
    steps: int = 20,
    seed: int = 0,
    known: Outcome | None = None,
) -> Iterator[dict[str, CurvePoint]]:
    """What each model says at each radius, one attack after the other.

    Each radius is searched on its own, so a curve may rise where a search did worse than the one before.

    Args:
        models (`dict[str, nn.Module]`), pixels (`Tensor`), norm (`str`), steps (`int`), seed (`int`): As
            [`attack_image`] takes them.
        radii (`Sequence[float]`): In [0, 1] pixels; 0 for the clean image.
        known (`Outcome`, *optional*): An outcome with the same arguments, that is not computed again.
    """
    for eps in radii:
        outcome = known
        if outcome is None or outcome.eps != eps:
            outcome = attack_image(models, pixels, norm, eps, steps=steps, seed=seed)
        yield {name: CurvePoint.of(eps, attacked) for name, attacked in outcome.attacked.items()}


@torch.no_grad()
def _answer(model: nn.Module, pixels: Tensor) -> Answer:
    with attack_mode(model):
        return Answer(model(pixels[None].to(_device(model)))[0].float().softmax(0).cpu())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
