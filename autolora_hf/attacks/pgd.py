"""Projected gradient descent in pixel space (Madry et al., ICLR 2018)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ThreatModel
from ..pixels import check_pixels


AttackLoss = Literal["ce", "kl", "targeted", "l2", "cosine"]
# They move away from where the output is without an attack: there their gradient is zero.
_FROM_CLEAN = ("kl", "l2", "cosine")
# Halvings of the range of an L1 projection's threshold, to about what float32 tells apart.
_BISECTIONS = 24
# Losses of outputs that are no logits of labels.
_WITHOUT_LABELS = ("l2", "cosine")


@contextmanager
def attack_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode without parameter gradients; on exit every module and parameter is as it was before.

    Eval mode keeps the norm statistics and turns dropout off, so an attack changes no buffer and draws nothing from
    the global random state. Parameter gradients are switched off because an attack needs input gradients alone.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        forget_cached(model)
        for module, _ in modes:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        forget_cached(model)
        for module, training in modes:
            module.training = training
        for parameter in trainable:
            parameter.requires_grad_(True)


def forget_cached(model: nn.Module) -> None:
    """Drops what layers keep in eval mode of values computed from their weights; training flags stay as they are.

    The attention of LeViT and its kin looks its biases up once, and only forgets them when it is told to train. After
    a change of the weights they would be those of before.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        if type(module).train is not nn.Module.train:
            module.train(True)
    for module, training in modes:
        module.training = training


@dataclass
class PGD:
    """Projected gradient descent inside a threat model.

    Calling an instance runs the attack: `attack(model, pixels, labels) -> adversarial pixels`. The model is run in
    eval mode and left exactly as it was: weights, buffers, gradients, training flags and the global random state.

    Args:
        threat_model (`ThreatModel`): Norm and radius of the ball, in [0, 1] pixels. In L1 PGD is much weaker than
            AutoAttack, whatever its steps (Croce and Hein, ICML 2021).
        steps (`int`): Number of gradient steps. 10 is the training attack of AutoLoRa.
        step_size (`float`, *optional*): Length of a step in [0, 1] pixels. `None`: a quarter of `eps`, which is the
            paper's 2/255 at 8/255.
        loss (`str`): `"ce"` maximises the cross-entropy of the labels; `"kl"` maximises KL(model(x) || model(x~)),
            the inner problem of TRADES (labels are ignored while searching); `"targeted"` takes the labels as classes
            to be reached and minimises their cross-entropy. Without labels: `"l2"` maximises the squared distance of
            the output, N x D, from a reference (FARE), `"cosine"` one minus their cosine (Sim-CLIP).
        random_start (`bool`): Start from a uniformly drawn point of the ball.
        restarts (`int`): Independent runs; for every image the run that fools the model, else the one with the
            largest loss, is returned. More than one needs `random_start`.
        seed (`int`): Seed of the random starts when the call gets no `generator`.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 10
    step_size: float | None = None
    loss: AttackLoss = "ce"
    random_start: bool = True
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.threat_model, ThreatModel):
            raise TypeError(f"`threat_model` must be a ThreatModel, got {type(self.threat_model).__name__}.")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"`steps` must be an integer of at least 1, got {self.steps!r}.")
        if self.loss not in get_args(AttackLoss):
            raise ValueError(f"`loss` must be one of {', '.join(get_args(AttackLoss))}, got {self.loss!r}.")
        if not isinstance(self.restarts, int) or self.restarts < 1:
            raise ValueError(f"`restarts` must be an integer of at least 1, got {self.restarts!r}.")
        if self.restarts > 1 and not self.random_start:
            raise ValueError("`restarts` > 1 without `random_start` would repeat the same run.")
        if self.loss in _FROM_CLEAN and not self.random_start:
            raise ValueError(
                f"`loss={self.loss!r}` needs `random_start`: at the clean image its gradient is exactly zero."
            )
        if self.step_size is None:
            self.step_size = self.threat_model.eps / 4
        if not self.step_size > 0:
            raise ValueError(f"`step_size` must be positive, got {self.step_size}.")
        # Such steps only jump between the ball's borders: a weak attack that looks like a robust model.
        if self.step_size >= 1 and self.step_size > 2 * self.threat_model.eps:
            raise ValueError(
                f"`step_size` is {self.step_size:g} in units of [0, 1] pixels, longer than the ball is wide "
                f"({self.threat_model}). Did you mean {self.step_size:g}/255 = {self.step_size / 255:.5f}?"
            )

    def __str__(self) -> str:
        restarts = f", {self.restarts} restarts" if self.restarts > 1 else ""
        loss = "" if self.loss == "ce" else f" ({self.loss})"
        return f"PGD-{self.steps}{loss}{restarts}"

    def __call__(
        self,
        model: nn.Module,
        pixels: Tensor,
        labels: Tensor,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:
        """Returns adversarial images of the same shape, dtype and device.

        Args:
            model (`nn.Module`): Maps pixels in [0, 1], N x C x H x W, to logits N x K; see
                [`AutoLoraModel.pixel_space`].
            pixels (`Tensor`): Images, float, in [0, 1].
            labels (`Tensor`): Class indices, N; the classes to reach when `loss="targeted"`.
            start (`Tensor`, *optional*): First iterate, used as it is instead of a random one.
            generator (`torch.Generator`, *optional*): Source of the random starts. Without one every call draws from
                a fresh generator seeded with `seed`, so equal calls give equal images.
            reference (`Tensor`, *optional*): N x D, what `"l2"` and `"cosine"` move the output away from. `None`: the
                output for the images as they are.
        """
        check_pixels(pixels)
        if start is not None and self.restarts > 1:
            raise ValueError("`start` fixes the first iterate, so it cannot be combined with `restarts` > 1.")
        return self.search(model, pixels, labels, start=start, generator=generator, reference=reference)

    def search(
        self,
        model: nn.Module,
        pixels: Tensor,
        labels: Tensor,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        reference: Tensor | None = None,
        losses: list[Tensor] | None = None,
    ) -> Tensor:
        """The attack itself, on pixels that are known to be right: it never makes the host wait for the device.

        Arguments as of calling the instance.

        Args:
            losses (`list[Tensor]`, *optional*): Gets the loss of every image, N, at each gradient of the first run:
                that of the start first. That of the images that are returned is not among them, since it would take
                another pass.
        """
        if generator is None:
            generator = torch.Generator(device=pixels.device).manual_seed(self.seed)
        pixels = pixels.detach()
        with attack_mode(model), torch.enable_grad():
            if self.loss == "kl" or (self.loss in _FROM_CLEAN and reference is None):
                with torch.no_grad():
                    reference = logits_of(model(pixels))
                reference = F.softmax(reference, dim=-1) if self.loss == "kl" else reference
            best = self._run(model, pixels, labels, reference, start, generator, losses)
            if self.restarts > 1:
                best_fooled, best_loss = self._outcome(model, best, labels, reference)
            for _ in range(self.restarts - 1):
                candidate = self._run(model, pixels, labels, reference, start, generator)
                fooled, loss = self._outcome(model, candidate, labels, reference)
                # A run that fools the model beats every run that does not, whatever the losses are.
                better = (fooled & ~best_fooled) | ((fooled == best_fooled) & (loss > best_loss))
                best = torch.where(better.view(-1, 1, 1, 1), candidate, best)
                best_fooled, best_loss = best_fooled | fooled, torch.where(better, loss, best_loss)
        return best

    def _run(
        self,
        model: nn.Module,
        pixels: Tensor,
        labels: Tensor,
        reference: Tensor | None,
        start: Tensor | None,
        generator: torch.Generator,
        losses: list[Tensor] | None = None,
    ) -> Tensor:
        if start is not None:
            adversarial = start.detach().to(pixels)
        elif self.random_start:
            noise = random_perturbation(pixels, self.threat_model, generator)
            adversarial = (pixels + noise).clamp_(0, 1)
        else:
            adversarial = pixels
        ball, step_size = Ball(pixels, self.threat_model), cast(float, self.step_size)  # since `__post_init__`
        for _ in range(self.steps):
            adversarial = adversarial.detach().requires_grad_(True)
            found = self._losses(logits_of(model(adversarial)), labels, reference)
            (gradient,) = torch.autograd.grad(found.sum(), adversarial)
            if losses is not None:
                losses.append(found.detach())
            adversarial = ball.ascend(adversarial.detach(), gradient, step_size)
        return adversarial

    def _losses(self, logits: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
        """Of every image, N; `reference` is there for the losses that look at it."""
        if self.loss == "kl":
            return F.kl_div(F.log_softmax(logits, dim=-1), cast(Tensor, reference), reduction="none").sum(-1)
        if self.loss == "l2":
            return (logits - cast(Tensor, reference)).square().sum(-1)
        if self.loss == "cosine":
            return 1 - F.cosine_similarity(logits, cast(Tensor, reference), dim=-1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return -losses if self.loss == "targeted" else losses

    @torch.no_grad()
    def _outcome(
        self, model: nn.Module, candidate: Tensor, labels: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits = logits_of(model(candidate))
        if self.loss in _WITHOUT_LABELS:
            return torch.zeros(len(logits), dtype=torch.bool, device=logits.device), self._losses(
                logits, labels, reference
            )
        hit = logits.argmax(-1) == labels
        return hit if self.loss == "targeted" else ~hit, self._losses(logits, labels, reference)


def hits(logits: Any, labels: Any) -> Any:
    """Which rows of `logits`, N x K, are largest at their label; tensors or arrays. Rows with a NaN are wrong.

    `argmax` alone takes the first NaN for the largest value.
    """
    return (logits.argmax(-1) == labels) & ~(logits != logits).any(-1)


def logits_of(output: Any) -> Tensor:
    """The logits, N x K, of a model output: a tensor, or anything with `.logits`. Of an image tower its embeddings."""
    if isinstance(output, Tensor):
        return output
    if is_embedding(output):
        return output["image_embeds"] if "image_embeds" in output else output["pooler_output"]
    hidden = getattr(output, "last_hidden_state", None)
    if not hasattr(output, "logits") and hidden is not None and hidden.ndim == 2:
        return hidden  # PP-LCNet of transformers calls its logits so
    return output.logits


def is_embedding(output: Any) -> bool:
    """Whether a model output has no logits, but an embedding of the whole image."""
    named = isinstance(output, Mapping) and not hasattr(output, "logits")
    hidden = output.get("last_hidden_state") if named else None
    is_classifier = hidden is not None and hidden.ndim == 2
    return named and not is_classifier and ("image_embeds" in output or "pooler_output" in output)


def random_perturbation(pixels: Tensor, threat_model: ThreatModel, generator: torch.Generator) -> Tensor:
    """Draws one perturbation an image uniformly from the ball of `threat_model`."""
    if threat_model.norm == "linf":
        noise = torch.empty_like(pixels).uniform_(-1, 1, generator=generator)
        return noise.mul_(threat_model.eps)
    # Uniform in an L2 or L1 ball of dimension d: a uniform point of its surface times a radius u^(1/d).
    if threat_model.norm == "l2":
        direction = torch.empty_like(pixels).normal_(generator=generator)
        direction = direction / l2_norms(direction)
    else:
        direction = torch.empty_like(pixels).exponential_(generator=generator)
        direction = direction / direction.flatten(1).sum(1).view(-1, 1, 1, 1)
        direction = direction * torch.empty_like(pixels).uniform_(-1, 1, generator=generator).sign()
    radius = torch.empty_like(pixels[:, :1, :1, :1]).uniform_(0, 1, generator=generator)
    return direction * radius.pow(1 / pixels[0].numel()) * threat_model.eps


class Ball:
    """The images that a threat model allows: a ball around each of `pixels`, N x C x H x W, within [0, 1]."""

    def __init__(self, pixels: Tensor, threat_model: ThreatModel) -> None:
        self.pixels, self.threat_model = pixels, threat_model
        if threat_model.norm == "linf":
            # Ball and [0, 1] are both boxes, and so is what they have in common: one clamp instead of two.
            self._low = (pixels - threat_model.eps).clamp_(0, 1)
            self._high = (pixels + threat_model.eps).clamp_(0, 1)

    def ascend(self, images: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """One steepest-ascent step of length `step_size` in the norm of the threat model, projected.

        In L1 the step goes to the 0.5 % of the pixel values with the largest gradients, as in SLIDE (Tramer and
        Boneh, NeurIPS 2019), among those that [0, 1] still lets move (Croce and Hein, ICML 2021).
        """
        if self.threat_model.norm == "linf":
            return self.project(images + step_size * gradient.sign())
        if self.threat_model.norm == "l2":
            return self.project(images + step_size * gradient / l2_norms(gradient))
        is_stuck = ((images <= 0) & (gradient < 0)) | ((images >= 1) & (gradient > 0))
        gains = torch.where(is_stuck, 0, gradient).flatten(1)
        count = max(1, gains.shape[1] // 200)
        largest = gains.abs().topk(count, dim=1).indices
        step = torch.zeros_like(gains).scatter_(1, largest, gains.gather(1, largest).sign())
        return self.project(images + (step_size / count) * step.view_as(images))

    def project(self, images: Tensor) -> Tensor:
        """Projects onto the ball and [0, 1]; where one after the other, the second step never leaves the ball."""
        if self.threat_model.norm == "linf":
            return images.clamp(self._low, self._high)
        change = images - self.pixels
        if self.threat_model.norm == "l1":
            return self._project_l1(change)
        images = self.pixels + change * (self.threat_model.eps / l2_norms(change)).clamp(max=1)
        return images.clamp_(0, 1)

    def _project_l1(self, change: Tensor) -> Tensor:
        """The nearest point of what the L1 ball and [0, 1] have in common (Croce and Hein, ICML 2021, Prop. 2.1).

        It is the change with every absolute value lowered by one threshold, cut with [0, 1]; the threshold is found by
        bisection.
        """
        size, sign = change.abs(), change.sign()
        low = torch.zeros_like(change[:, :1, :1, :1])
        high = size.amax((1, 2, 3), keepdim=True)

        def lowered(threshold: Tensor) -> Tensor:
            return (self.pixels + sign * (size - threshold).clamp(min=0)).clamp(0, 1)

        def is_inside(images: Tensor) -> Tensor:
            return (images - self.pixels).abs().sum((1, 2, 3), keepdim=True) <= self.threat_model.eps

        best = torch.where(is_inside(lowered(low)), low, high)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            inside = is_inside(lowered(middle))
            low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
        return lowered(torch.minimum(best, high))


def l2_norms(tensor: Tensor) -> Tensor:
    """Euclidean length of each image, N x 1 x 1 x 1, kept away from zero."""
    # 1e-12 is zero in half precision.
    least = max(1e-12, torch.finfo(tensor.dtype).tiny)
    return tensor.flatten(1).norm(dim=1).clamp(min=least).view(-1, 1, 1, 1)
