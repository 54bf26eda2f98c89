"""Makes the quickstart's backbone: a small timm ResNet, adversarially trained on Fashion-MNIST.

Reads the four IDX files of Debian's package `dataset-fashion-mnist` (60,000 training and 10,000 test images), trains
with PGD adversarial training (Madry et al., 2018) under Linf, eps = 0.1, keeps an exponential moving average of the
weights, measures the result and writes a timm checkpoint folder (`config.json`, `model.safetensors`,
`PROVENANCE.json`).

The test images are used once, for the figures in the provenance file: nothing is selected with them.

    apt-get install dataset-fashion-mnist
    python scripts/pretrain_quickstart_backbone.py --output autolora_hf/assets/quickstart
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gzip
import json
import platform
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from autolora_hf.attacks import PGD
from autolora_hf.config import ThreatModel
from autolora_hf.pixels import Normalize, Preprocessing


ARCHITECTURE = "resnet18"
MODEL_ARGS = {"layers": [1, 1, 1, 1], "channels": [32, 48, 64, 128], "stem_type": "deep", "stem_width": 16}
IMAGE_SIZE = (28, 28)
# Mean and standard deviation of the training pixels, the same for the three equal channels.
MEAN, STD = (0.286,) * 3, (0.353,) * 3
LABELS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Pixels N x 3 x 28 x 28 in [0, 1] and labels N of the "train" or "t10k" split."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, *IMAGE_SIZE)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    pixels = torch.from_numpy(images.copy()).float().div_(255).expand(-1, 3, -1, -1)
    return pixels, torch.from_numpy(labels.copy()).long()


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A random shift of up to 2 pixels, one for the batch, and a random horizontal flip of each image."""
    top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
    pixels = F.pad(pixels, (2, 2, 2, 2))[..., top : top + IMAGE_SIZE[0], left : left + IMAGE_SIZE[1]]
    flip = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(flip.view(-1, 1, 1, 1), pixels.flip(-1), pixels)


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    batches = zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
    return sum((model(x).argmax(-1) == y).sum().item() for x, y in batches) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--max-lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-samples", type=int, default=10_000, help="Test images for the reported figures.")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    started = time.time()

    pixels, labels = read_split(args.data, "train")
    preprocessing = Preprocessing(IMAGE_SIZE, MEAN, STD, crop_pct=1.0)
    backbone = timm.create_model(ARCHITECTURE, num_classes=10, **MODEL_ARGS)
    model = nn.Sequential(Normalize(preprocessing), backbone)
    average = copy.deepcopy(model).eval()
    updates = args.epochs * (len(labels) // args.batch_size)
    optimizer = torch.optim.SGD(model.parameters(), args.max_lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.max_lr, total_steps=updates, pct_start=0.25)

    update = 0
    for epoch in range(args.epochs):
        # The radius grows over the first three epochs: from random weights the full one stalls.
        eps = args.eps * min(1.0, (epoch + 1) / 4)
        attack = PGD(ThreatModel("linf", eps), steps=args.steps, step_size=1.5 * eps / args.steps)
        model.train()
        total, hits = 0.0, 0
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order[: len(order) // args.batch_size * args.batch_size].split(args.batch_size):
            x, y = augment(pixels[chosen], generator), labels[chosen]
            adversarial = attack(model, x, y, generator=generator)
            logits = model(adversarial)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            update += 1
            decay = min(0.999, (1 + update) / (10 + update))
            with torch.no_grad():
                for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                    mean.lerp_(value, 1 - decay) if mean.is_floating_point() else mean.copy_(value)
            total, hits = total + loss.item() * len(y), hits + (logits.argmax(-1) == y).sum().item()
        done = len(order) // args.batch_size * args.batch_size
        print(
            f"epoch {epoch + 1}/{args.epochs}  eps {eps:.3f}  loss {total / done:.4f}  "
            f"robust training accuracy {hits / done:.4f}  {time.time() - started:.0f} s",
            flush=True,
        )

    minutes = (time.time() - started) / 60
    test_pixels, test_labels = (tensor[: args.test_samples] for tensor in read_split(args.data, "t10k"))
    attack = PGD(ThreatModel("linf", args.eps), steps=20)
    adversarial = torch.cat(
        [attack(average, x, y) for x, y in zip(test_pixels.split(500), test_labels.split(500), strict=True)]
    )
    provenance = {
        "what": "Backbone of the quickstart, adversarially trained from random weights.",
        "data": "Fashion-MNIST (MIT licence), Debian package dataset-fashion-mnist, 60,000 training images as RGB",
        "architecture": ARCHITECTURE,
        "model_args": MODEL_ARGS,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "method": "PGD adversarial training (Madry et al., 2018), exponential moving average of the weights",
        "threat_model": {"norm": "linf", "eps": args.eps},
        "arguments": {k: v for k, v in vars(args).items() if k not in ("data", "output")},
        "measured": {
            "samples": len(test_labels),
            "split": "test",
            "natural_accuracy": accuracy(average, test_pixels, test_labels),
            "pgd20_accuracy": accuracy(average, adversarial, test_labels),
        },
        "minutes": round(minutes, 1),
        "date": datetime.date.today().isoformat(),
        "device": f"CPU ({platform.machine()}), one thread",
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "command": "python scripts/pretrain_quickstart_backbone.py --output autolora_hf/assets/quickstart",
    }
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 10,
        "num_features": average[1].num_features,
        "global_pool": "avg",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "input_size": [3, *IMAGE_SIZE],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": MEAN,
            "std": STD,
            "num_classes": 10,
            "pool_size": [1, 1],
            "first_conv": "conv1.0",
            "classifier": "fc",
            "license": "apache-2.0",
            "label_names": LABELS,
        },
    }
    args.output.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in average[1].state_dict().items()}
    save_file(state, args.output / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", config), ("PROVENANCE.json", provenance)):
        (args.output / name).write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(provenance["measured"], indent=2))


if __name__ == "__main__":
    main()
