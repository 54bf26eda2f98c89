"""Pixel space: what a checkpoint expects of an image, and normalisation as part of the model.

Attacks, data and reports speak of float pixels in [0, 1]. Mean and standard deviation are applied inside the module
that is attacked, so that epsilon always means what the threat model says.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


# PIL's resampling codes, which transformers' image processors store as integers.
_RESAMPLE_NAMES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class Preprocessing:
    """How a checkpoint wants its images.

    Args:
        image_size (`tuple[int, int]`): Height and width in pixels.
        mean (`tuple[float, ...]`): Mean of the normalisation, one value a channel, for pixels in [0, 1].
        std (`tuple[float, ...]`): Standard deviation of the normalisation, likewise.
        interpolation (`str`): Resampling filter of the resize.
        crop_pct (`float`): Share of the resized image that the evaluation crop keeps, in (0, 1].
        crop_mode (`str`): `"center"` resizes the shorter side and crops; `"squash"` resizes both sides to the target.
    """

    image_size: tuple[int, int] = field(default=(224, 224), metadata={"help": "Height and width in pixels."})
    mean: tuple[float, ...] = field(default=(0.485, 0.456, 0.406), metadata={"help": "Mean a channel."})
    std: tuple[float, ...] = field(default=(0.229, 0.224, 0.225), metadata={"help": "Standard deviation a channel."})
    interpolation: str = field(default="bicubic", metadata={"help": "Resampling filter."})
    crop_pct: float = field(default=0.875, metadata={"help": "Share of the image the evaluation crop keeps."})
    crop_mode: str = field(default="center", metadata={"help": "'center' or 'squash'."})

    def __post_init__(self) -> None:
        # Lists come back from JSON; tuples keep the object hashable and comparable.
        for name in ("image_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"`image_size` must be (height, width) in pixels, got {self.image_size}.")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError(
                f"Only models of RGB images (3 channels) are supported, got mean {self.mean} and std {self.std}."
            )
        if min(self.std) <= 0:
            raise ValueError(f"`std` must be positive, got {self.std}.")
        if self.interpolation not in _RESAMPLE_NAMES.values():
            raise ValueError(
                f"`interpolation` must be one of {sorted(_RESAMPLE_NAMES.values())}, got {self.interpolation!r}."
            )
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"`crop_pct` must be in (0, 1], got {self.crop_pct}.")
        if self.crop_mode not in ("center", "squash"):
            raise ValueError(f"`crop_mode` must be 'center' or 'squash', got {self.crop_mode!r}.")

    @classmethod
    def from_timm(cls, model: nn.Module) -> Preprocessing:
        """Reads `pretrained_cfg` of a timm model; the image size of its patch embedding, if it has one, wins."""
        config = model.pretrained_cfg
        size = config["input_size"][-2:]
        patches = getattr(model, "patch_embed", None)
        if getattr(patches, "img_size", None) is not None:
            size = patches.img_size
        return cls(
            image_size=size,
            mean=config["mean"],
            std=config["std"],
            # timm's "random" is a training-time choice among filters; evaluation uses bicubic.
            interpolation="bicubic" if config["interpolation"] == "random" else config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode="squash" if config["crop_mode"] == "squash" else "center",
        )

    @classmethod
    def from_image_processor(cls, processor: Any) -> Preprocessing:
        """Reads a transformers image processor."""
        size, crop = processor.size, getattr(processor, "crop_size", None)
        crop_pct, crop_mode = 1.0, "center"
        if crop and getattr(processor, "do_center_crop", False):
            image_size = (crop["height"], crop["width"])
            shortest = size.get("shortest_edge") or min(size["height"], size["width"])
            crop_pct = min(1.0, min(image_size) / shortest)
        elif size.get("shortest_edge"):
            # ConvNextImageProcessor, which ResNets use too: below 384 px it resizes to size / crop_pct and crops the
            # centre, from 384 px on it squashes.
            image_size = (size["shortest_edge"],) * 2
            crop_pct = getattr(processor, "crop_pct", None) or 1.0
            if size["shortest_edge"] >= 384:
                crop_pct, crop_mode = 1.0, "squash"
        else:
            image_size, crop_mode = (size["height"], size["width"]), "squash"
        identity = not getattr(processor, "do_normalize", True)
        return cls(
            image_size=image_size,
            mean=(0.0,) * 3 if identity else processor.image_mean,
            std=(1.0,) * 3 if identity else processor.image_std,
            interpolation=_RESAMPLE_NAMES[int(processor.resample)],
            crop_pct=crop_pct,
            crop_mode=crop_mode,
        )

    @property
    def resize_size(self) -> int:
        """Length of the shorter side before the evaluation crop, in pixels."""
        return math.floor(min(self.image_size) / self.crop_pct)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Normalize(nn.Module):
    """`(pixels - mean) / std` with the statistics as non-persistent buffers, so that they move with the model."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


def check_pixels(pixels: Any, name: str = "pixels", image_size: tuple[int, int] | None = None) -> None:
    """Raises unless `pixels` is a float tensor N x C x H x W with values in [0, 1].

    Args:
        pixels: What to check.
        name (`str`): What to call it in the message, for instance the column it came from.
        image_size (`tuple[int, int]`, *optional*): Height and width it must have.
    """
    if not isinstance(pixels, Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor of pixels in [0, 1], got {type(pixels).__name__}.")
    if not pixels.is_floating_point():
        raise TypeError(
            f"`{name}` must be float pixels in [0, 1], got {pixels.dtype}. "
            "For 8-bit images convert with `images.float() / 255`."
        )
    if pixels.ndim != 4:
        raise ValueError(f"`{name}` must have shape N x C x H x W, got {tuple(pixels.shape)}.")
    if image_size is not None and tuple(pixels.shape[-2:]) != tuple(image_size):
        raise ValueError(
            f"`{name}` must be images of {image_size[0]} x {image_size[1]} pixels, the size this model was built for, "
            f"got {pixels.shape[-2]} x {pixels.shape[-1]}. Give images of any size as PIL images, and they are "
            "resized, or pass `preprocessing=` with another `image_size` to `get_autolora_model`."
        )
    if pixels.numel() == 0:
        raise ValueError(f"`{name}` is empty: shape {tuple(pixels.shape)}.")
    low, high = (value.item() for value in pixels.detach().aminmax())
    if math.isnan(low) or math.isnan(high) or math.isinf(low) or math.isinf(high):
        raise ValueError(f"`{name}` contains NaN or infinite values.")
    # Bicubic resizing of floats can overshoot by a rounding error; anything more is another scale.
    if low < -1e-6 or high > 1 + 1e-6:
        if low < -1e-6:
            hint = "They look normalised: leave out the mean and std, the model applies them after the attack."
        else:
            hint = "They look like 8-bit values: divide by 255."
        raise ValueError(f"`{name}` must be in [0, 1], got values from {low:.4g} to {high:.4g}. {hint}")
