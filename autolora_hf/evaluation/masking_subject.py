"""What gradient-masking diagnostics share: the model, what is measured of it once, and their findings."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor, nn

from ..attacks import PGD
from ..attacks.pgd import hits, random_perturbation
from ..config import ThreatModel
from .comparison import paired_p_value
from .findings import Finding
from .view import AttackView


# Largest probability of raising a false alarm by chance, of each check.
LEVEL = 0.01
# Numbers of steps after which one run of PGD is looked at.
STEPS = (1, 5, 10, 50)
RESTARTS = 5


def finding(name: str, failed: bool, found: str, advice: str = "", **figures: float | int | list[float]) -> Finding:
    """A finding of a check that ran; `advice` ends the sentence of one that failed."""
    return Finding(name, "failed" if failed else "passed", f"{found}: {advice}." if failed else f"{found}.", figures)


class Subject:
    """The model under diagnosis, with what several checks need of it; every measurement is made once.

    Args:
        view (`AttackView`): The deployed model, which judges.
        target (`AttackView`): What attacks differentiate.
        pixels (`Tensor`): Clean images that the model classifies correctly, N x C x H x W, in [0, 1].
        labels (`Tensor`): Class indices, N.
        threat_model (`ThreatModel`): Norm and radius of the ball.
        num_classes (`int`): Number of logits.
        seed (`int`): Seed of all random draws.
    """

    def __init__(
        self,
        view: AttackView,
        target: AttackView,
        pixels: Tensor,
        labels: Tensor,
        threat_model: ThreatModel,
        num_classes: int,
        seed: int,
    ) -> None:
        self.view, self.target, self.pixels, self.labels = view, target, pixels, labels
        self.threat_model, self.num_classes, self.seed = threat_model, num_classes, seed
        self.ever_broken = torch.zeros(len(labels), dtype=torch.bool, device=pixels.device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def precision(self) -> float:
        """Relative rounding error of the coarsest parameter of the model."""
        kinds = {tensor.dtype for tensor in [*self.view.parameters(), *self.target.parameters()]}
        return max((torch.finfo(kind).eps for kind in kinds if kind.is_floating_point), default=0.0)

    def generator(self, number: int) -> torch.Generator:
        """A source of random numbers of its own for every `number`."""
        return torch.Generator(device=self.pixels.device).manual_seed(self.seed * 1009 + number)

    def random_images(self, number: int) -> Tensor:
        """Uniformly drawn points of the balls around the clean images, within [0, 1]."""
        noise = random_perturbation(self.pixels, self.threat_model, self.generator(number))
        return (self.pixels + noise).clamp_(0, 1)

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Logits of the deployed model, N x K."""
        return self.view(pixels)

    def margins(self, pixels: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """By how much the deployed model prefers the label to any other class, N; at most 0 where it is fooled.

        Args:
            pixels (`Tensor`): Images.
            rows (`Tensor`, *optional*): Which of the clean images they were made of; by default all.
        """
        logits, labels = self.logits(pixels), self.labels[rows]
        found = logit_margins(logits, labels).nan_to_num(nan=-torch.inf)
        # `argmax` decides between equal logits.
        return torch.where(hits(logits, labels), found.clamp(min=torch.finfo(found.dtype).tiny), found.clamp(max=0))

    def attack(self, attack: PGD, rows: Tensor, start: Tensor, *, rescaled: bool = False) -> tuple[Tensor, Tensor]:
        """Runs PGD on some of the images, on the copy that attacks search on.

        Args:
            attack (`PGD`): Its settings.
            rows (`Tensor`): Positions of the images.
            start (`Tensor`): First iterates.
            rescaled (`bool`): Attack logits whose range is always 10, of which the cross-entropy lowers the margin.

        Returns:
            The images, and what [`margins`] says of them.
        """
        target = _Rescaled(self.target) if rescaled else self.target
        pixels = attack(target, self.pixels[rows], self.labels[rows], start=start)
        return pixels, self.margins(pixels, rows)

    @cached_property
    def rows(self) -> Tensor:
        """Positions of all images, N."""
        return torch.arange(len(self), device=self.pixels.device)

    @cached_property
    def clean(self) -> Tensor:
        """Logits of the clean images, N x K."""
        return self.logits(self.pixels)

    @cached_property
    def gradients(self) -> tuple[Tensor, Tensor]:
        """Input gradients of the cross-entropy at the clean images, N x C x H x W, and the cross-entropy itself, N."""
        pixels = self.pixels.clone().requires_grad_(True)
        losses = F.cross_entropy(self.target(pixels), self.labels, reduction="none")
        return torch.autograd.grad(losses.sum(), pixels)[0], losses.detach()

    @cached_property
    def attacked(self) -> dict[int, Tensor]:
        """Margins after each number of `STEPS` of one run of PGD, N; going on is cheaper than starting again."""
        found, images, done = {}, self.random_images(0), 0
        for steps in STEPS:
            images, found[steps] = self.attack(PGD(self.threat_model, steps=steps - done), self.rows, images)
            self.ever_broken |= found[steps] <= 0
            done = steps
            if steps == 10:
                self.adversarial = images
        return found

    @cached_property
    def probes(self) -> Tensor:
        """Logits of images that show nothing, which tell whether there is anything at all that the model does
        otherwise: noise, black, grey and white."""
        noise = torch.rand(
            4, *self.pixels.shape[1:], generator=self.generator(1), device=self.pixels.device, dtype=self.pixels.dtype
        )
        plain = torch.tensor([0, 0.5, 1]).to(noise).view(3, 1, 1, 1).expand(3, *self.pixels.shape[1:])
        return self.logits(torch.cat([noise, plain]))

    @cached_property
    def has_counterexample(self) -> Tensor:
        """For which images another one is known that is classified otherwise, N."""
        predicted = torch.cat([self.probes, self.clean]).argmax(1)
        return (predicted[None] != self.labels[:, None]).any(1)


class _Rescaled(nn.Module):
    """Logits whose range is always 10, so that their cross-entropy neither underflows nor saturates."""

    def __init__(self, view: AttackView) -> None:
        super().__init__()
        self.view = view

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.view(pixels)
        scale = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
        return logits * (10 / scale.clamp(min=torch.finfo(logits.dtype).tiny))


def logit_margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The label's logit less the largest other one, N."""
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return logits.gather(1, labels[:, None]).squeeze(1) - others


def several(count: int, total: int) -> bool:
    """More than one image, or all there are: for what never happens to an honest model but for one odd image."""
    return count > 1 or count == total > 0


def exceeds(count: int, total: int, share: float) -> bool:
    """Whether so large a `count` of `total` images is no chance if each is affected with probability `share`.

    An exact binomial test; one image is never enough.
    """
    return count > 1 and float(binomtest(count, total, share, alternative="greater").pvalue) <= LEVEL


def sign_test(lost: Tensor, gained: Tensor) -> float:
    """p-value of the images `lost` (bool, N) being so many more than those `gained`, if either were as likely."""
    return paired_p_value(int(lost.sum()), int(gained.sum()))


def accuracy_of(margins: Tensor) -> float:
    """Share of the images that withstood, in [0, 1]."""
    return float((margins > 0).double().mean())
