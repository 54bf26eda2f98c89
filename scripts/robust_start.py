"""Calibrates the measurement that recognises robustly pre-trained backbones (`autolora_hf.training.robust_start`).

Compares the quickstart's robust backbone with a twin that is trained naturally on the same images (Fashion-MNIST,
Debian package `dataset-fashion-mnist`) and with random weights of several architectures, on 16 digits.

    python scripts/robust_start.py --data /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from pretrain_quickstart_backbone import ARCHITECTURE, IMAGE_SIZE, MEAN, MODEL_ARGS, STD, augment, read_split
from torch import Tensor, nn

from autolora_hf import Preprocessing, ThreatModel, get_autolora_model
from autolora_hf.pixels import Normalize
from autolora_hf.quickstart import load_digits
from autolora_hf.training.robust_start import IMAGES, MOVABLE, feature_displacement


PREPROCESSING = Preprocessing(IMAGE_SIZE, MEAN, STD, crop_pct=1.0)
RANDOM = {"test_resnet": {}, "test_efficientnet": {}, "test_vit": {"img_size": 28, "patch_size": 7}}
RADII = {"2/255": 2 / 255, "4/255": 4 / 255, "8/255": 8 / 255, "0.1": 0.1}


def natural_twin(folder: Path, steps: int) -> nn.Module:
    """The quickstart's architecture after `steps` of plain training, with one-cycle SGD in batches of 128."""
    generator = torch.Generator().manual_seed(0)
    pixels, labels = read_split(folder, "train")
    network = timm.create_model(ARCHITECTURE, num_classes=10, **MODEL_ARGS)
    model = nn.Sequential(Normalize(PREPROCESSING), network).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (128,), generator=generator)
        loss = F.cross_entropy(model(augment(pixels[chosen], generator)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def digits() -> Tensor:
    images = load_digits()["train"].shuffle(seed=0).select(range(IMAGES))["image"]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).float() / 255
    return pixels[:, None].expand(-1, 3, -1, -1).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--steps", type=int, default=468, help="Training steps of the natural twin.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    networks = {"robust (quickstart)": "quickstart", "natural twin": natural_twin(args.data, args.steps)}
    for name, options in RANDOM.items():
        networks[f"random {name}"] = timm.create_model(name, num_classes=10, **options).eval()
    pixels = digits()
    print(f"warns above {MOVABLE}".ljust(28), *(f"{name:>8}" for name in RADII))
    for name, network in networks.items():
        preprocessing = None if network == "quickstart" else PREPROCESSING
        model = get_autolora_model(network, preprocessing=preprocessing)
        moved = (feature_displacement(model, pixels, ThreatModel("linf", eps)) for eps in RADII.values())
        print(name.ljust(28), *(f"{value:8.3f}" for value in moved), flush=True)


if __name__ == "__main__":
    main()
