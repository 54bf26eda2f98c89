"""Evaluates as the cases say and writes down what came out, in one process or in each of several.

As a script: `evaluation_worker.py FOLDER` runs all cases; `evaluation_worker.py FOLDER RANK PASSES` runs the long one
with a checkpoint in `FOLDER/checkpoint`, and the process of this rank kills itself in the middle of a pass.
"""

import contextlib
import io
import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyautoattack
import torch
import torch.distributed as dist
from tiny_models import MODELS, pixels
from torch import nn

from autolora_hf.attacks import PGD
from autolora_hf.cli import main
from autolora_hf.config import ThreatModel
from autolora_hf.evaluation import AttackView, evaluate_robustness


THREAT = ThreatModel("linf", 0.003)


def shorten_autoattack():
    """Fewer iterations and queries."""
    original = pyautoattack.AutoAttack.__init__

    def initialise(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10
        self.square.n_queries = 30

    pyautoattack.AutoAttack.__init__ = initialise


class Randomised(nn.Module):
    """A network that adds noise to its logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        logits = self.network(x)
        return logits + 0.01 * torch.randn_like(logits)


def network(num_classes=4):
    """A small network that answers every class about as often."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        model = nn.Sequential(body, nn.Linear(512, num_classes)).eval()
        model[1].bias -= model(pixels(200, seed=9)).mean(0)
    return model


def images(view, count):
    """Random images with the classes that the model sees in them, but for the first."""
    x = pixels(count)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)  # for models that are randomised
        logits = view(x)
    labels = logits.argmax(1)
    if count > 1:
        labels[0] = (labels[0] + 1) % logits.shape[1]
    return x, labels


@dataclass
class Nudge:
    """Moves every image by some share of the radius, and fails as it is told.

    Args:
        share: Of the radius; more than 1 leaves the ball.
        error: Is raised instead.
        only_rank: The process in which it goes wrong; all of them if `None`.
    """

    share: float = 1.0
    error: type[Exception] | None = None
    only_rank: int | None = field(default=None, repr=False)

    def __call__(self, model, x, y):
        rank = dist.get_rank() if dist.is_initialized() else 0
        bad = self.only_rank in (None, rank)
        if bad and self.error is not None:
            raise self.error("the attack broke down")
        generator = torch.Generator().manual_seed(1)
        sign = torch.randn(x.shape, generator=generator).sign()
        return (x + (self.share if bad else 1) * THREAT.eps * sign).clamp(0, 1)


@dataclass(frozen=True)
class Case:
    """An evaluation.

    Args:
        model: Takes no arguments.
        count: Number of images.
        attack, options: Of `evaluate_robustness`.
    """

    model: Any
    count: int
    attack: Any
    options: dict = field(default_factory=dict)


def adapted(name, **config):
    return lambda: MODELS[name].adapted(**config)


WEAK = [PGD(THREAT, steps=1), PGD(THREAT, steps=4, seed=3)]
CASES = {
    # 6, 5, 1 and 23 batches for two processes, and a single image.
    "pgd-even": Case(network, 23, WEAK, {"batch_size": 4}),
    "pgd-odd": Case(network, 23, WEAK, {"batch_size": 5}),
    "pgd-few": Case(network, 23, WEAK, {"batch_size": 64}),
    "pgd-alone": Case(network, 23, WEAK, {"batch_size": 1}),
    "pgd-one": Case(network, 1, WEAK),
    "pgd-subset": Case(network, 40, WEAK, {"batch_size": 3, "max_samples": 17, "seed": 5}),
    "adapter": Case(
        adapted("hf_vit", mode="adapter"), 7, "pgd", {"batch_size": 2, "threat_model": ThreatModel("linf", 0.07)}
    ),
    "natural": Case(
        adapted("timm_resnet", norm="dual"),
        7,
        "pgd",
        {"batch_size": 2, "threat_model": ThreatModel("linf", 0.006), "route": "natural"},
    ),
    "sections": Case(
        adapted("timm_resnet"),
        7,
        "pgd",
        {
            "batch_size": 2,
            "threat_model": ThreatModel("linf", 0.006),
            "route": "both",
            "curve": [0.002, 0.02],
            "corruptions": ["gaussian_noise"],
        },
    ),
    "randomised": Case(lambda: Randomised(network()), 11, WEAK, {"batch_size": 2}),
    "autoattack": Case(network, 14, [PGD(THREAT, steps=1), "autoattack"], {"batch_size": 4}),
    "autoattack-l2": Case(
        lambda: network(3), 9, "autoattack", {"batch_size": 2, "threat_model": ThreatModel("l2", 0.3)}
    ),
}
# Without diagnostics, whose passes are those of one process.
LONG = Case(network, 24, [PGD(THREAT, steps=1), "autoattack"], {"batch_size": 4, "diagnostics": False})


def evaluate(case, **options):
    model = case.model()
    route = case.options.get("route", "robust")
    data = images(AttackView(model, "robust" if route == "both" else route), case.count)
    options = {"threat_model": THREAT, "progress": False, **case.options, **options}
    return evaluate_robustness(model, data, options.pop("threat_model"), case.attack, **options)


class BrokenImage(torch.utils.data.Dataset):
    """Image number 6 cannot be read; a batch of the second process of two, if batches have four images."""

    preprocessing = None

    def __init__(self, x, labels):
        self.x, self.labels = x, labels.tolist()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index == 6:
            raise OSError("image 6 is truncated")
        return {"pixel_values": self.x[index], "labels": self.labels[index]}


def failures(folder):
    """Evaluations that go wrong in one process only; what each raises."""
    data, rank = images(network(), 16), dist.get_rank()

    def run(model=None, dataset=data, attack=WEAK, **options):
        options = {"batch_size": 4, "progress": False, **options}
        return lambda: evaluate_robustness(model or network(), dataset, THREAT, attack, **options)

    shifted = network()
    with torch.no_grad():
        shifted[1].bias += rank
    blocked = folder / "blocked"
    blocked.write_text("a file")
    return {
        "attack raises": run(attack=Nudge(error=ValueError, only_rank=1)),
        "own kind of error": run(attack=Nudge(error=torch.OutOfMemoryError, only_rank=1)),
        "left the ball": run(attack=Nudge(share=1.5, only_rank=1)),
        "broken image": run(dataset=BrokenImage(*data)),
        "other weights": run(shifted),
        "other seed": run(seed=rank),
        "other number of images": run(sample_indices=list(range(12 + rank))),
        "wrong argument": run(attack="apgd" if rank else WEAK),
        "one without checkpoint": run(checkpoint_dir=folder / "some" if rank else None),
        "checkpoint is a file": run(checkpoint_dir=blocked if rank else folder / "other"),
    }


def outcome(call):
    try:
        return call().to_dict()
    except Exception as error:
        return [type(error).__name__, str(error)]


def report_of(case, **options):
    return evaluate(case, **options).to_dict()


def work(folder):
    """All cases, in each of the processes."""
    found = {name: report_of(case) for name, case in CASES.items()}
    found["failures"] = {name: outcome(call) for name, call in failures(folder).items()}
    # The processes still work together after all of that.
    found["again"] = report_of(CASES["pgd-odd"])
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        report_of(CASES["pgd-even"], progress=True)
    found["shown"] = shown.getvalue()
    resumed = folder / "resumed"
    try:
        failing = [*WEAK, Nudge(error=ValueError, only_rank=None)]
        evaluate(Case(network, 23, failing, {"batch_size": 4}), checkpoint_dir=resumed)
    except ValueError as error:
        found["interrupted"] = str(error)
    if (folder / "model").exists():
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            command = "evaluate model --data images --attack pgd --steps 2 --batch-size 4 --output report.json"
            with contextlib.chdir(folder):
                found["status"] = main([*command.split(), "--checkpoint-dir", "kept"])
        found["printed"] = shown.getvalue()
    return found


def killed(folder, rank, passes):
    """The long case, until this rank kills itself in pass number `passes` of the attacked model."""
    own = dist.get_rank() if dist.is_initialized() else 0
    model, seen = network(), 0

    def count(*_):
        nonlocal seen
        seen += 1
        if seen == passes and own == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_hook(count)
    evaluate(Case(lambda: model, LONG.count, LONG.attack, LONG.options), checkpoint_dir=folder / "checkpoint")


if __name__ == "__main__":
    torch.set_num_threads(1)
    shorten_autoattack()
    place = Path(sys.argv[1])
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    if len(sys.argv) > 2:
        killed(place, int(sys.argv[2]), int(sys.argv[3]))
    else:
        here = dist.get_rank()
        (place / f"rank-{here}.json").write_text(json.dumps(work(place)))
