"""Gradient-masking checks that look at the model around the clean images, without an attack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attacks import PGD
from ..attacks.pgd import Ball
from .findings import Finding
from .masking_subject import LEVEL, Subject, exceeds, finding, logit_margins, several, sign_test


# Lengths of the steps of numeric derivatives, in [0, 1] pixels: the function may be curved at the long ones and drown
# in rounding errors at the short ones, so one that agrees is enough.
LENGTHS = (1e-2, 1e-3, 1e-4, 1e-5)
ALONE = 8
DIRECTIONS = 5


def zero_gradients(subject: Subject) -> Finding:
    """Whether the cross-entropy has an input gradient at all (Athalye et al., ICML 2018; Carlini et al., 2019).

    A cross-entropy that underflows to 0 need not harm an attack, so it counts only where an attack on rescaled logits
    breaks significantly more images than the same attack on the logits as they are.
    """
    gradients, losses = subject.gradients
    sizes = gradients.flatten(1).abs().amax(1)
    zero, underflown = ~(sizes > 0) | ~sizes.isfinite(), losses == 0
    more = fewer = 0
    if underflown.any():
        rows = underflown.nonzero().squeeze(1)
        start = subject.random_images(0)[rows]
        rescaled = subject.attack(PGD(subject.threat_model), rows, start, rescaled=True)[1] <= 0
        plain = subject.attacked[10][rows] <= 0
        subject.ever_broken[rows] |= rescaled
        gained, lost = rescaled & ~plain, plain & ~rescaled
        hidden = sign_test(gained, lost) <= LEVEL
        more, fewer = int(gained.sum()), int(lost.sum())
    else:
        hidden = False
    none, under = int(zero.sum()), int(underflown.sum())
    found = (
        f"The input gradient is exactly zero or not finite for {none} of {len(subject)} clean images and the "
        f"cross-entropy underflows to 0 for {under}"
    )
    if under:
        found += f", of which PGD-10 on rescaled logits breaks {more} more and {fewer} fewer"
    masked = several(none, len(subject))
    advice = "gradient-based attacks on the cross-entropy are blind here, so attack the margin of rescaled logits"
    if masked:
        advice += " or a differentiable stand-in for the layer that stops the gradient"
    else:
        advice += "; the targeted attacks of AutoAttack do not depend on the scale of the logits"
    return finding(
        "zero gradients",
        masked or hidden,
        found,
        advice,
        zero=none,
        underflown=under,
        images=len(subject),
        broken_by_rescaling=more,
        spared_by_rescaling=fewer,
    )


def finite_differences(subject: Subject) -> Finding:
    """Whether autograd says of the deployed model's margin what differences of its values say.

    The direction is the sign of the gradient, along which the derivative is largest compared with rounding errors;
    random signs where the gradient is zero. Pixels are first moved away from 0 and 1, where a step would leave the
    domain of images, and a little apart from each other: where equal ones meet, as in flat areas, a maximum or a
    median has no derivative. Half precision rounds away the steps, so such models are not tested.
    """
    name = "finite differences"
    if subject.precision > 1e-6:
        return Finding(
            name, "not run", "The model is in half precision, whose rounding errors hide small differences."
        )
    with _full_precision():
        claimed, changes = _derivatives(subject)
    # Differences of logits are exact to a few roundings of the largest one.
    rounding = 2e-6 * subject.clean.abs().amax(1)
    judged, agrees = torch.zeros_like(subject.ever_broken), torch.zeros_like(subject.ever_broken)
    error = torch.full_like(claimed, torch.inf)
    for length, change in zip(LENGTHS, changes, strict=True):
        expected = 2 * length * claimed
        size = torch.maximum(change.abs(), expected.abs())
        visible = size > 20 * rounding
        gap = torch.where(visible, (change - expected).abs() / size.clamp(min=1e-30), torch.inf)
        error, judged, agrees = torch.minimum(error, gap), judged | visible, agrees | (gap < 0.2)
    wrong, seen = int((judged & ~agrees).sum()), int(judged.sum())
    if not seen:
        return Finding(
            name, "not run", f"Small steps change the logits of none of {len(subject)} images by more than rounding."
        )
    worst = float(error[judged].clamp(max=1e6).median())
    return finding(
        name,
        exceeds(wrong, seen, 0.05),
        f"Differences of the model's values contradict its gradient for {wrong} of {seen} images (median relative "
        f"error {worst:.2g})",
        "some layer returns a gradient that is not its own, so look for `detach`, `no_grad`, rounding or custom "
        "backward functions",
        contradicted=wrong,
        images=seen,
        median_relative_error=worst,
    )


def _derivatives(subject: Subject) -> tuple[Tensor, list[Tensor]]:
    """The derivative of the margin along some direction by autograd, N, and its change over twice each length, N."""
    apart = 2 * torch.rand(subject.pixels.shape, generator=subject.generator(9), device=subject.pixels.device) - 1
    centre = subject.pixels.clamp(2 * LENGTHS[0], 1 - 2 * LENGTHS[0]) + LENGTHS[0] * apart
    centre = centre.to(subject.pixels).requires_grad_(True)
    (gradient,) = torch.autograd.grad(logit_margins(subject.target(centre), subject.labels).sum(), centre)
    centre, gradient = centre.detach(), gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    has_gradient = gradient.flatten(1).any(1).view(-1, 1, 1, 1)
    direction = torch.where(has_gradient, gradient.sign(), _random_signs(subject, 2))
    changes = []
    for length in LENGTHS:
        ahead, behind = (
            logit_margins(subject.logits(centre + signed * direction), subject.labels) for signed in (length, -length)
        )
        changes.append((ahead - behind).double())
    return (gradient.double() * direction).flatten(1).sum(1), changes


@contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32, whose rounding on GPUs hides small differences."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def repeatability(subject: Subject) -> Finding:
    """Whether a second and third pass give the same logits; attacks on a randomised model must average over it."""
    bound = max(1e-4, subject.precision)
    changes = torch.zeros(len(subject), device=subject.pixels.device)
    with torch.no_grad():
        for view in dict.fromkeys((subject.view, subject.target)):
            first = view(subject.pixels)
            for _ in range(2):
                changes = torch.maximum(changes, relative_gaps(view(subject.pixels), first))
    count, largest = int((changes > bound).sum()), float(changes.max())
    return finding(
        "repeatability",
        several(count, len(subject)),
        f"From pass to pass the logits of {count} of {len(subject)} images change, by up to {largest:.2g} of their "
        "length",
        "attack the expectation over the model's randomness (EOT), since attacks on single draws overstate robustness",
        changed=count,
        images=len(subject),
        largest_change=largest,
    )


def single_image(subject: Subject) -> Finding:
    """Whether an image alone gets the logits that it gets in a batch, unlike with norms on statistics of the batch."""
    name, count = "single image", min(ALONE, len(subject))
    if len(subject) < 2:
        return Finding(name, "not run", "One image is no batch to compare with.")
    try:
        alone = torch.cat([subject.logits(subject.pixels[row : row + 1]) for row in range(count)])
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        return Finding(
            name,
            "failed",
            f"The model cannot classify one image alone ({reason}): classify each image independently of the others.",
            {"images": count},
        )
    gaps = relative_gaps(alone, subject.clean[:count])
    differing, flips = int((gaps > _tolerance(subject)).sum()), _flips(alone, subject.clean[:count])
    return finding(
        name,
        several(differing, count),
        f"Alone instead of in a batch, {differing} of {count} images get other logits (by up to "
        f"{float(gaps.max()):.2g} of their length) and {flips} another class",
        "an attack on a batch then says nothing about single images, so use the running statistics of norm layers",
        differing=differing,
        other_class=flips,
        images=count,
        largest_gap=float(gaps.max()),
    )


def attacked_route(subject: Subject) -> Finding:
    """Whether attacks search on the function that is deployed, on clean and on attacked images."""
    _ = subject.attacked
    images = torch.cat([subject.pixels, subject.adversarial])
    deployed = torch.cat([subject.clean, subject.logits(subject.adversarial)])
    with torch.no_grad():
        searched = torch.cat([subject.target(part) for part in images.split(len(subject))])
    gaps = relative_gaps(searched, deployed)
    differing, flips = int((gaps > _tolerance(subject)).sum()), _flips(searched, deployed)
    return finding(
        "attacked route",
        several(differing, len(images)),
        f"What attacks search on and what is deployed give other logits to {differing} of {len(images)} clean and "
        f"attacked images (by up to {float(gaps.max()):.2g} of their length) and another class to {flips}",
        "attack the deployed route with its norm mode, since attacks on another function overstate robustness",
        differing=differing,
        other_class=flips,
        images=len(images),
        largest_gap=float(gaps.max()),
    )


def loss_landscape(subject: Subject) -> Finding:
    """Whether the gradient points anywhere: one attack step along it against random steps of the same length.

    The cosine between gradients at the clean image and a tenth of the radius beside it says how rugged the landscape
    is. It is low for some honest models too, which attacks break nevertheless, so it is reported and not judged.
    """
    gradients, _ = subject.gradients
    near = subject.pixels + (subject.random_images(3) - subject.pixels) / 10
    near.requires_grad_(True)
    losses = F.cross_entropy(subject.target(near), subject.labels, reduction="sum")
    cosines = torch.cosine_similarity(torch.autograd.grad(losses, near)[0].flatten(1), gradients.flatten(1))
    cosine = float(cosines.nan_to_num().median())
    ball, step = Ball(subject.pixels, subject.threat_model), subject.threat_model.eps / 4
    directions = [gradients, *(_random_signs(subject, 4 + number) for number in range(DIRECTIONS))]
    leads, gains = torch.zeros_like(subject.ever_broken), []
    # Either measure will do: the cross-entropy is blind where it underflows, and where many classes are close its
    # gradient need not be that of the margin.
    for measure in (_negative_margins, _losses):
        before = measure(subject.clean, subject.labels)
        along, *random = (
            measure(subject.logits(ball.ascend(subject.pixels, direction, step)), subject.labels) - before
            for direction in directions
        )
        leads |= (along > 0) & (along >= torch.stack(random).amax(0))
        gains.append(float(along.median()))
    count = int(leads.sum())
    return finding(
        "loss landscape",
        # Of useless gradients, one in six leads by chance in either measure.
        exceeds(len(subject) - count, len(subject), 0.5),
        f"A step along the gradient raises the loss more than {DIRECTIONS} random steps of its length for {count} of "
        f"{len(subject)} images, and gradients at neighbouring points have a median cosine of {cosine:.2f}",
        "the landscape is too flat or too rugged for gradients, so use gradients averaged over noise and attacks "
        "without gradients",
        leads=count,
        images=len(subject),
        median_cosine=cosine,
        median_margin_lost=gains[0],
        median_loss_gained=gains[1],
    )


def _negative_margins(logits: Tensor, labels: Tensor) -> Tensor:
    return -logit_margins(logits, labels)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _random_signs(subject: Subject, number: int) -> Tensor:
    draws = torch.rand(subject.pixels.shape, generator=subject.generator(number), device=subject.pixels.device)
    return (draws - 0.5).sign().to(subject.pixels)


def relative_gaps(logits: Tensor, reference: Tensor) -> Tensor:
    """Length of each difference of logits as a share of that of the reference, N, without what all classes share."""
    gaps, centred = logits - reference, reference - reference.mean(1, keepdim=True)
    gaps = gaps - gaps.mean(1, keepdim=True)
    return (gaps.norm(dim=1) / centred.norm(dim=1).clamp(min=1e-12)).nan_to_num(nan=torch.inf)


def _flips(logits: Tensor, reference: Tensor) -> int:
    return int((logits.argmax(1) != reference.argmax(1)).sum())


def _tolerance(subject: Subject) -> float:
    """Allowed relative gap between ways of computing the same logits; TF32 on GPUs rounds to 1e-3."""
    return max(1e-2, 10 * subject.precision)
