"""Gradient-masking diagnostics: reasons to believe, or not, that an attack which failed proves robustness.

The checks are those of Athalye, Carlini and Wagner ("Obfuscated gradients give a false sense of security", ICML 2018,
section 3.1) and of Carlini et al. ("On evaluating adversarial robustness", 2019), with the black-box attack of Croce
and Hein (ICML 2020). Like Pintor et al. ("Indicators of attack failure", NeurIPS 2022) each one has a criterion that a
program can decide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..attacks import PGD, attack_mode
from ..attacks.pgd import hits
from ..config import Norm, ThreatModel
from ..progress import progress_bar
from .autoattack import autoattack_components, isolated_random_state, load_library
from .comparison import holm
from .findings import Finding
from .masking_local import (
    attacked_route,
    finite_differences,
    loss_landscape,
    repeatability,
    single_image,
    zero_gradients,
)
from .masking_subject import (
    LEVEL,
    RESTARTS,
    STEPS,
    Subject,
    accuracy_of,
    exceeds,
    finding,
    several,
    sign_test,
)
from .stages import verified
from .view import AttackView


MAX_IMAGES = 64
QUERIES = 500
DRAWS = 10


def gradient_masking_findings(
    model_view: AttackView,
    target_view: AttackView,
    pixels: Tensor,
    labels: Tensor,
    threat_model: ThreatModel,
    num_classes: int,
    seed: int = 0,
    max_images: int = MAX_IMAGES,
    progress: bool = False,
) -> list[Finding]:
    """Looks for signs that gradient-based attacks overstate the robustness of a model.

    A check that fails proves nothing, and one that passes proves nothing either: they say whether the attacks behave
    as they must on a model that they are able to attack. Counts of images are judged by exact tests, so that a model
    is not suspected by chance. The model and the global random states are left as they were.

    Args:
        model_view (`AttackView`): The deployed model, which judges.
        target_view (`AttackView`): What attacks differentiate; the same function, possibly the same object.
        pixels (`Tensor`): Clean images, N x C x H x W, in [0, 1]. Those that the model gets wrong are left out, and
            so are those after the first `max_images`.
        labels (`Tensor`): Class indices, N.
        threat_model (`ThreatModel`): Norm and radius of the ball.
        num_classes (`int`): Number of logits.
        seed (`int`): Seed of all random draws.
        max_images (`int`): Images to look at, all of them in one pass. Of fewer than 64 less can be proven.
        progress (`bool`): Show a progress bar.

    Returns:
        One finding for each check, always in the order of `CHECKS`.
    """
    with (
        attack_mode(model_view),
        attack_mode(target_view),
        _buffers_kept(model_view),
        _buffers_kept(target_view),
        isolated_random_state(seed),
        torch.enable_grad(),
    ):
        # A copy: models may normalise in place.
        pixels, labels = pixels.detach().float().clone(), labels.detach()
        with torch.no_grad():
            chosen = hits(model_view(pixels), labels).nonzero().squeeze(1)[:max_images] if len(pixels) else []
        if len(chosen) == 0:
            return _none_run("None of the given images is classified correctly, so there is nothing to attack.")
        subject = Subject(model_view, target_view, pixels[chosen], labels[chosen], threat_model, num_classes, seed)
        answers = torch.cat([subject.clean, subject.probes])
        if bool((answers == answers[:1]).all()):
            return _none_run("The model gives every image the same logits, as one with a head of zeros does.")
        bar = progress_bar(
            CHECKS.items(), title="gradient masking", unit="check", is_shown=progress, delay=0, leave=True
        )
        found = {name: check(subject) for name, check in bar}
        if found["repeatability"].outcome == "failed":
            reason = "The logits change from pass to pass, so that two of them cannot be compared."
            found.update({name: Finding(name, "not run", reason) for name in _COMPARE_PASSES})
        return list(found.values())


def random_noise(subject: Subject) -> Finding:
    """Whether PGD finds lower margins than random points of the ball do."""
    attacked = subject.attacked[10]
    noisy = torch.stack([subject.margins(subject.random_images(20 + n)) for n in range(DRAWS)]).amin(0)
    subject.ever_broken |= noisy <= 0
    # Where both fool the model, the one is not worse than the other.
    both = (attacked <= 0) & (noisy <= 0)
    p_value = sign_test((noisy < attacked) & ~both, (attacked < noisy) & ~both)
    by_noise, by_attack = int((noisy <= 0).sum()), int((attacked <= 0).sum())
    worse = int(((noisy < attacked) & ~both).sum())
    return finding(
        "random noise",
        p_value <= LEVEL,
        f"The worst of {DRAWS} random perturbations breaks {by_noise} of {len(subject)} images and PGD-10 "
        f"{by_attack}, with a higher margin than the noise left for {worse}",
        "the gradient leads nowhere, so attack without gradients or through a differentiable stand-in",
        broken_by_noise=by_noise,
        broken_by_pgd=by_attack,
        noise_better=worse,
        images=len(subject),
        p_value=p_value,
    )


def more_steps(subject: Subject) -> Finding:
    """Whether images that fewer steps of PGD break withstand more of them."""
    broken = [subject.attacked[steps] <= 0 for steps in STEPS]
    pairs = [*itertools.pairwise(broken), (broken[0], broken[-1])]
    p_value = min(holm([sign_test(fewer & ~more, more & ~fewer) for fewer, more in pairs]))
    accuracies = [accuracy_of(subject.attacked[steps]) for steps in STEPS]
    listed = ", ".join(f"{accuracy:.0%}" for accuracy in accuracies)
    return finding(
        "more steps",
        p_value <= LEVEL,
        f"After {', '.join(map(str, STEPS))} steps of PGD {listed} of {len(subject)} images withstand",
        "more steps help the model, so the gradient misleads and robust accuracy is at most the lowest of these",
        accuracies=accuracies,
        steps=list(STEPS),
        images=len(subject),
        p_value=p_value,
    )


def restarts(subject: Subject) -> Finding:
    """How many images further random starts of PGD break: many, where the result depends on luck."""
    rows = (subject.attacked[10] > 0).nonzero().squeeze(1)
    first, attack = len(rows), PGD(subject.threat_model)
    for number in range(1, RESTARTS):
        if len(rows):
            start = subject.random_images(40 + number)[rows]
            margins = subject.attack(attack, rows, start)[1]
            subject.ever_broken[rows[margins <= 0]] = True
            rows = rows[margins > 0]
    total, gained = len(subject), first - len(rows)
    return finding(
        "restarts",
        exceeds(gained, total, 0.05),
        f"With {RESTARTS} random starts of PGD-10 instead of one, accuracy on {total} images falls from "
        f"{first / total:.0%} to {len(rows) / total:.0%}",
        "the attack depends on where it starts, so use many restarts and more steps",
        accuracy_once=first / total,
        accuracy_restarted=len(rows) / total,
        images=total,
    )


def black_box(subject: Subject) -> Finding:
    """Whether Square, which needs no gradients, breaks images that withstood everything with gradients."""
    name = "black box"
    height, width = subject.pixels.shape[-2:]
    try:
        _, left_out = autoattack_components(subject.threat_model, subject.num_classes, (height, width), subject.seed)
    except ImportError:
        return Finding(name, "not run", "Square needs the package pyautoattack: `pip install pyautoattack`.")
    if "Square" in left_out:
        return Finding(name, "not run", f"Square cannot run: {left_out['Square']}.")
    rows, total = (~subject.ever_broken).nonzero().squeeze(1), len(subject)
    if len(rows):
        # Like Square this one lowers the margin, in small steps: what else it breaks, it does not owe to masking.
        fine = PGD(subject.threat_model, steps=20, step_size=subject.threat_model.eps / 10)
        rows = rows[subject.attack(fine, rows, subject.random_images(0)[rows], rescaled=True)[1] > 0]
    if not len(rows):
        return Finding(name, "passed", f"PGD breaks all {total} images, which leaves none for Square.")
    pixels, labels = subject.pixels[rows].contiguous(), subject.labels[rows]
    square = load_library().square.SquareAttack(
        _Answering(subject.target, subject.num_classes),
        norm=subject.threat_model.norm_name,
        n_queries=QUERIES,
        eps=subject.threat_model.eps,
        seed=subject.seed,
        device=pixels.device,
    )
    images = verified(square.perturb(pixels, labels), pixels, subject.threat_model, "Square")
    broken = int((subject.margins(images, rows) <= 0).sum())
    return finding(
        name,
        exceeds(broken, len(rows), 0.02),
        f"Square with {QUERIES} queries and no gradients breaks {broken} of the {len(rows)} of {total} images that "
        "withstand PGD",
        "the gradients are masked, so robust accuracy is that of the black-box attack or lower",
        broken=broken,
        withstood_pgd=len(rows),
        images=total,
        queries=QUERIES,
    )


def large_epsilon(subject: Subject) -> Finding:
    """Whether accuracy falls to chance as the radius grows to where all images look alike, and never rises."""
    norm, eps = subject.threat_model.norm, subject.threat_model.eps
    largest = max(_erasing_radius(norm, subject.pixels[0].numel()), eps)
    radii = [eps * (largest / eps) ** share for share in ((1 / 3, 2 / 3, 1) if largest > eps else (1,))]
    start = subject.random_images(0)
    margins = [subject.attacked[10]]
    for radius in radii:
        # From the small ball: a start drawn in the large one is noise, which fools a model without any gradient.
        attack = PGD(ThreatModel(norm, radius), steps=20, step_size=radius / 8)
        margins.append(subject.attack(attack, subject.rows, start)[1])
        if accuracy_of(margins[-1]) == 0:
            break
    radii, broken = [eps, *radii[: len(margins) - 1]], [found <= 0 for found in margins]
    p_value = min(holm([sign_test(near & ~far, far & ~near) for near, far in itertools.pairwise(broken)]))
    accuracies = [accuracy_of(found) for found in margins]
    left = int((~broken[-1] & subject.has_counterexample).sum())
    stuck = exceeds(left, len(subject), 1 / subject.num_classes)
    pairs = ", ".join(f"{accuracy:.0%} at {radius:.3g}" for accuracy, radius in zip(accuracies, radii, strict=True))
    found = f"As the {norm} radius grows, accuracy under PGD is {pairs} (chance is {1 / subject.num_classes:.1%})"
    if not stuck and p_value > LEVEL and exceeds(int((~broken[-1]).sum()), len(subject), 1 / subject.num_classes):
        return Finding(
            "large epsilon", "not run", f"{found}, but no image is known that the model classifies otherwise."
        )
    return finding(
        "large epsilon",
        stuck or p_value <= LEVEL,
        found,
        "an attack that may change everything must succeed, so the gradients are masked",
        radii=radii,
        accuracies=accuracies,
        chance=1 / subject.num_classes,
        images=len(subject),
        p_value=p_value,
    )


def unbounded(subject: Subject) -> Finding:
    """Whether an attack that may change every pixel to anything fools the model on every image.

    The Linf ball of radius 1 holds every image, whatever the norm of the threat model is. An image on which the attack
    fails counts only if some image is known that the model classifies otherwise.
    """
    everything, rows, start = ThreatModel("linf", 1.0), subject.rows, subject.random_images(0)
    # What long steps jump over, short ones may find.
    for steps, step_size in ((20, 0.1), (40, 0.03), (40, 0.25)):
        if len(rows):
            attack = PGD(everything, steps=steps, step_size=step_size)
            margins = subject.attack(attack, rows, start[rows])[1]
            rows = rows[margins > 0]
    total = len(subject)
    failed = int(subject.has_counterexample[rows].sum())
    found = f"PGD without a bound breaks {total - len(rows)} of {total} images"
    if len(rows) and not failed:
        return Finding(
            "unbounded attack", "not run", f"{found}, and no image is known that the model classifies otherwise."
        )
    return finding(
        "unbounded attack",
        several(failed, total),
        found,
        "images that fool the model exist, so the gradients that do not lead to them are masked",
        broken=total - len(rows),
        images=total,
    )


# By name, in the order in which they are reported. The black-box attack comes after all that use gradients.
CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "zero gradients": zero_gradients,
    "finite differences": finite_differences,
    "repeatability": repeatability,
    "single image": single_image,
    "attacked route": attacked_route,
    "random noise": random_noise,
    "more steps": more_steps,
    "restarts": restarts,
    "black box": black_box,
    "large epsilon": large_epsilon,
    "unbounded attack": unbounded,
    "loss landscape": loss_landscape,
}


# They take a difference between two passes for one between two functions.
_COMPARE_PASSES = ("finite differences", "single image", "attacked route")


def _none_run(reason: str) -> list[Finding]:
    return [Finding(name, "not run", reason) for name in CHECKS]


def _erasing_radius(norm: Norm, size: int) -> float:
    """A radius from which every image of `size` values can be turned into plain grey, or the largest there is."""
    radius = {"linf": 0.5, "l2": math.sqrt(size) / 2}.get(norm, size / 2)
    while True:
        try:
            return ThreatModel(norm, radius).eps
        except ValueError:
            radius /= 2


class _Answering(nn.Module):
    """A model that also takes no images, which is what Square asks for when all that are left lie on a boundary."""

    def __init__(self, view: AttackView, num_classes: int) -> None:
        super().__init__()
        self.view, self.num_classes = view, num_classes

    def forward(self, pixels: Tensor) -> Tensor:
        return self.view(pixels) if len(pixels) else pixels.new_zeros(0, self.num_classes)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """A model with norms on batch statistics updates its running ones even in eval mode."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                buffer.copy_(values)
