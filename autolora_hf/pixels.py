"""Pixel space: what a checkpoint expects of an image, and normalisation as part of the model.

Attacks, data and reports speak of float pixels in [0, 1]. Mean and standard deviation are applied inside the module
that is attacked, so that epsilon always means what the threat model says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn


# PIL's resampling codes, which transformers' image processors store as integers.
_RESAMPLE_NAMES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

# Those that the torchvision backend of transformers computes as PIL does: "nearest" takes another pixel where two are
# equally near, the rest does not exist.
_SHARED_FILTERS = ("bilinear", "bicubic", "lanczos")

# More than any image classifier takes, and few enough for a configuration of a stranger to be harmless.
MOST_PIXELS = 2048 * 2048


@dataclass(frozen=True)
class Preprocessing:
    """How a checkpoint wants its images.

    Args:
        image_size (`tuple[int, int]`): Height and width in pixels.
        mean (`tuple[float, ...]`): Mean of the normalisation, one value a channel, for pixels in [0, 1].
        std (`tuple[float, ...]`): Standard deviation of the normalisation, likewise.
        interpolation (`str`): Resampling filter of the resize.
        crop_pct (`float`): Share of the resized image's shorter side that the evaluation crop keeps. Above 1 (VOLO)
            the image is resized to less than the target and gets a black border.
        crop_mode (`str`): How an image of another shape becomes one of `image_size`, each side being resized to
            `image_size / crop_pct` before the centre is cropped: `"center"` fits the shorter side and cuts the longer
            one, `"squash"` fits both, `"border"` fits the longer one and fills the rest with the mean.
        channel_order (`str`): `"bgr"` if the network takes blue first (MobileViT of transformers). Pixels, mean and
            std are in the order of RGB all the same.
    """

    image_size: tuple[int, int] = field(default=(224, 224), metadata={"help": "Height and width in pixels."})
    mean: tuple[float, ...] = field(default=(0.485, 0.456, 0.406), metadata={"help": "Mean a channel."})
    std: tuple[float, ...] = field(default=(0.229, 0.224, 0.225), metadata={"help": "Standard deviation a channel."})
    interpolation: str = field(default="bicubic", metadata={"help": "Resampling filter."})
    crop_pct: float = field(default=0.875, metadata={"help": "Share of the image the evaluation crop keeps."})
    crop_mode: str = field(default="center", metadata={"help": "'center', 'squash' or 'border'."})
    channel_order: str = field(default="rgb", metadata={"help": "'rgb', or 'bgr' if the network takes blue first."})

    def __post_init__(self) -> None:
        # Lists come back from JSON; tuples keep the object hashable and comparable.
        for name in ("image_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"`image_size` must be (height, width) in pixels, got {self.image_size}.")
        if math.prod(self.image_size) > MOST_PIXELS:
            raise ValueError(f"`image_size` must be of at most {MOST_PIXELS:,} pixels in all, got {self.image_size}.")
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
        if not 0 < self.crop_pct <= 1.5:
            raise ValueError(f"`crop_pct` must be a share in (0, 1.5], got {self.crop_pct}.")
        if self.crop_mode not in ("center", "squash", "border"):
            raise ValueError(f"`crop_mode` must be 'center', 'squash' or 'border', got {self.crop_mode!r}.")
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(f"`channel_order` must be 'rgb' or 'bgr', got {self.channel_order!r}.")

    @classmethod
    def from_timm(cls, model: nn.Module, pretrained_cfg: dict[str, Any] | None = None) -> Preprocessing:
        """Reads how a timm model wants its images; the size it was built for wins over that of its checkpoint.

        Args:
            model (`nn.Module`): A timm model.
            pretrained_cfg (`dict`, *optional*): What is known of the checkpoint, where it differs from the model's
                own `pretrained_cfg`.
        """
        config = {**cast(Any, model).pretrained_cfg, **(pretrained_cfg or {})}
        size, saved = timm_image_size(model), getattr(model, "pretrained_model_args", {}).get("img_size")
        flexible = not getattr(model, "_traits", {}).get("fixed_input_size", True)
        if size is None or (flexible and (pretrained_cfg or (saved is not None and size_pair(saved) == size))):
            # It is not the size that was asked for but the one that the checkpoint was once built for.
            size = config["input_size"][-2:]
        return cls(
            image_size=size,
            mean=config["mean"],
            std=config["std"],
            # timm's "random" is a training-time choice among filters; evaluation uses bicubic.
            interpolation="bicubic" if config["interpolation"] == "random" else config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )

    @classmethod
    def from_image_processor(cls, processor: Any) -> Preprocessing:
        """Reads a transformers image processor, by running it.

        Classes of image processors resize and crop in ways of their own, which their attributes do not tell. So two
        test images are processed, and the crop that gives the same pixels is taken.

        Raises:
            ValueError: If the processor does something else than resize, crop, rescale and normalise, or its images
                have no fixed size.
        """
        kind = type(processor).__name__
        sizes = [getattr(processor, name, None) or {} for name in ("size", "crop_size")]
        sides = [side for size in sizes for side in ([size] if isinstance(size, int) else dict(size).values())]
        if any(isinstance(side, int) and side**2 > 4 * MOST_PIXELS for side in sides):
            raise ValueError(f"{kind} makes images larger than any classifier takes: {sizes}.")
        images = [_test_image(300, 400), _test_image(400, 300)]
        try:
            wanted = [processor(images=image, return_tensors="pt")["pixel_values"][0].float() for image in images]
        except Exception as error:
            raise ValueError(f"{kind} cannot process a colour image: {error}") from error
        if wanted[0].ndim != 3 or len(wanted[0]) != 3 or wanted[0].shape != wanted[1].shape:
            raise ValueError(
                f"{kind} gives tensors of shape {tuple(wanted[0].shape)} and {tuple(wanted[1].shape)} for a wide and "
                "a tall image; only models of RGB images of one fixed size are supported."
            )
        size = tuple(wanted[0].shape[-2:])
        mean, std = _affine(processor)
        resample = getattr(processor, "resample", None)
        closest, smallest = None, math.inf
        for pct, mode in itertools.product(_crop_candidates(processor, min(size)), ("center", "squash")):
            filter_name = "bilinear" if resample is None else _RESAMPLE_NAMES[int(resample)]
            candidate = cls(size, mean, std, filter_name, pct, mode)
            transform = candidate.evaluation_transform()
            made = [transform(image)[None].float() / 255 for image in images]
            for order in ("rgb", "bgr"):
                candidate = replace(candidate, channel_order=order)
                normalize = Normalize(candidate)
                difference = sum(
                    ((normalize(ours) - theirs).abs() * normalize.std).mean().item() * 255
                    for ours, theirs in zip(made, wanted, strict=True)
                ) / len(images)
                if difference < smallest:
                    closest, smallest = candidate, difference
        # On these images the filters of PIL and torch differ by 0.01, a crop that is off by a quarter of a pixel by
        # 2.5, other crops by 10 and more.
        if smallest > 3:
            raise ValueError(
                f"{kind} changes images in a way that no `Preprocessing` describes: the closest one is off by "
                f"{smallest:.1f}/255 on average. Pass `preprocessing=Preprocessing(...)` with what the model needs."
            )
        return cast(Preprocessing, closest)

    @classmethod
    def assumed(cls, processor: Any, image_size: tuple[int, int] | None = None) -> Preprocessing:
        """A stand-in for an image processor that [`from_image_processor`] refuses: its mean, standard deviation and
        filter, with a plain resize and crop; ImageNet's where `processor` is `None`.

        Args:
            processor: A transformers image processor, or `None`.
            image_size (`tuple[int, int]`, *optional*): Height and width.
        """
        changes: dict[str, Any] = {}
        if processor is not None:
            mean, std = _affine(processor)
            # Images of any shape keep their proportions, as with the processors that pad or that have no fixed size.
            changes = {"mean": mean, "std": std, "crop_pct": 1.0}
            if getattr(processor, "do_pad", False):
                changes["crop_mode"] = "border"
            if getattr(processor, "resample", None) is not None:
                changes["interpolation"] = _RESAMPLE_NAMES[int(processor.resample)]
            size = getattr(processor, "size", None) or {}
            height = size.get("height") or size.get("shortest_edge")
            if image_size is None and height:
                image_size = (height, size.get("width") or height)
        return cls(**changes) if image_size is None else cls(image_size=image_size, **changes)

    def evaluation_transform(self) -> Callable[[Image.Image], Tensor]:
        """Resizes and crops a PIL image of mode RGB to a uint8 tensor 3 x H x W."""
        return create_transform(
            self.image_size,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=self.mean,
            normalize=False,
        )

    def to_timm(self) -> dict[str, Any]:
        """The fields of timm's `pretrained_cfg` that [`from_timm`] reads."""
        fields = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        return {"input_size": (3, *self.image_size), **{name: getattr(self, name) for name in fields}}

    def to_image_processor(self) -> dict[str, Any] | None:
        """The content of a `preprocessor_config.json` with which `AutoImageProcessor` of transformers gives the pixels
        of [`evaluation_transform`], normalised; `None` where no processor of transformers does.

        The PIL backend gives the same pixels. The torchvision backend, which is the default, rounds otherwise: some
        pixels differ by 1/255, a few by 2/255. Where the crop cuts the longer side of an image by 3, 7, 11, ...
        pixels, both backends take it one pixel further left or up than torchvision's own transforms.

        Not possible are `crop_mode="border"`, `crop_mode="center"` with sides of two lengths, `crop_pct` above 1, and
        one with which that pixel is missed in every image (0.95 at 224 pixels), the filters `"nearest"`, `"box"` and
        `"hamming"`, and `channel_order="bgr"` with a normalisation.
        """
        height, width = self.image_size
        scaled = [math.floor(side / self.crop_pct) for side in self.image_size]
        centered, blue_first = self.crop_mode == "center", self.channel_order == "bgr"
        normalised = self.mean != (0, 0, 0) or self.std != (1, 1, 1)
        if (
            self.crop_mode == "border"
            or (centered and height != width)
            or self.crop_pct > 1
            or any(_cut_differently(large, side) for large, side in zip(scaled, self.image_size, strict=True))
            or self.interpolation not in _SHARED_FILTERS
            or (blue_first and normalised)
        ):
            return None
        fields = {
            # BiT's processor is the plain one with a crop. Only MobileViT's reverses channels; it cannot normalise.
            "image_processor_type": "MobileViTImageProcessor" if blue_first else "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": scaled[0]} if centered else {"height": scaled[0], "width": scaled[1]},
            "resample": next(code for code, name in _RESAMPLE_NAMES.items() if name == self.interpolation),
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
        }
        if blue_first:
            return {**fields, "do_flip_channel_order": True}
        return {**fields, "do_normalize": True, "image_mean": list(self.mean), "image_std": list(self.std)}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def size_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an image size that is given as one number or as two.

    Raises:
        ValueError: If it is anything else.
    """
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"`image_size` must be a number of pixels, or (height, width), got {size!r}.")
    return sides


def timm_image_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width that a timm model was built for, or `None` if it was built for no size in particular."""
    # timm notes what `img_size` a model was created with or set to, and whether it takes others.
    traits = getattr(model, "_traits", {})
    size = traits.get("img_size")
    if size is None and traits.get("fixed_input_size", True):
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return None if size is None else size_pair(size)


class Normalize(nn.Module):
    """`(pixels - mean) / std` in the network's order of channels.

    The statistics are non-persistent buffers, so that they move with the model.

    Args:
        preprocessing (`Preprocessing`): Mean, standard deviation and order of channels.
        dtype (`torch.dtype`): Precision of the statistics; that of the model if it is double.
    """

    def __init__(self, preprocessing: Preprocessing, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blue_first = preprocessing.channel_order == "bgr"
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocessing, name), dtype=dtype)
            self.register_buffer(name, values.view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        normalised = (pixels - cast(Tensor, self.mean)) / cast(Tensor, self.std)
        return normalised.flip(1) if self.blue_first else normalised


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
            f"`{name}` must be float pixels in [0, 1], got {pixels.dtype}{_value_range(pixels)}. "
            "For 8-bit images convert with `images.float() / 255`."
        )
    if pixels.ndim != 4:
        raise ValueError(f"`{name}` must have shape N x C x H x W, got {tuple(pixels.shape)}.")
    if image_size is not None and tuple(pixels.shape[-2:]) != tuple(image_size):
        raise ValueError(
            f"`{name}` must be images of {image_size[0]} x {image_size[1]} pixels, the size this model was built for, "
            f"got {pixels.shape[-2]} x {pixels.shape[-1]}. Give images of any size as PIL images, and they are "
            "resized, or pass another `image_size=` to `get_autolora_model`."
        )
    if pixels.numel() == 0:
        raise ValueError(f"`{name}` is empty: shape {tuple(pixels.shape)}.")
    low, high = (value.item() for value in pixels.detach().aminmax())
    if math.isnan(low) or math.isnan(high) or math.isinf(low) or math.isinf(high):
        bad = pixels.numel() - int(pixels.detach().isfinite().sum())
        raise ValueError(f"`{name}` contains NaN or infinite values: {bad} of {pixels.numel()}.")
    # Bicubic resizing of floats can overshoot by a rounding error; anything more is another scale.
    if low < -1e-6 or high > 1 + 1e-6:
        if low < -1e-6:
            hint = "They look normalised: leave out the mean and std, the model applies them after the attack."
        else:
            hint = "They look like 8-bit values: divide by 255."
        raise ValueError(f"`{name}` must be in [0, 1], got values from {low:.4g} to {high:.4g}. {hint}")


def _value_range(pixels: Tensor) -> str:
    if pixels.numel() == 0 or pixels.is_complex():
        return ""
    return f" with values from {pixels.min().item():.4g} to {pixels.max().item():.4g}"


def _test_image(height: int, width: int) -> Image.Image:
    """A smooth image in which every place and channel is different."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def _affine(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of what `processor` does to pixels in [0, 1], one value a channel."""
    mean: tuple[float, ...] = (0.0,) * 3
    std: tuple[float, ...] = (1.0,) * 3
    if getattr(processor, "do_normalize", None):
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    scale = 255 * (processor.rescale_factor if getattr(processor, "do_rescale", True) else 1)
    if not math.isclose(scale, 1) or getattr(processor, "rescale_offset", False):
        # EfficientNet may map to [-1, 1] first.
        offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
        mean, std = tuple((m + offset) / scale for m in mean), tuple(s / scale for s in std)
    if getattr(processor, "include_top", False):  # EfficientNet divides by std twice
        std = tuple(s * t for s, t in zip(std, processor.image_std, strict=True))
    return mean, std


def _crop_candidates(processor: Any, side: int) -> list[float]:
    """Values of `crop_pct` that `processor` may mean, for images of `side` pixels."""
    size = getattr(processor, "size", None) or {}
    # LeViT resizes to 256 / 224 of its size and does not say so.
    edges = [side, math.floor(side * 256 / 224), math.floor(side / (getattr(processor, "crop_pct", None) or 1))]
    edges += [edge for edge in (size.get("shortest_edge"), size.get("height"), size.get("width")) if edge]
    edges.append(getattr(processor, "resize_short", None) or side)
    shares = [_share(side, edge) for edge in dict.fromkeys(edges)]
    return [share for share in shares if 0 < share <= 1.5]


def _share(side: int, edge: int) -> float:
    """The `crop_pct` with which `side` pixels remain of `edge`: one that checkpoints state, if it is not the quotient.

    Several shares give the same number of pixels, since timm rounds down: 0.95 and 0.9532 both make 224 of 235.
    """
    usual = [1.0, 0.875, *(percent / 100 for percent in sorted(range(85, 100), key=lambda percent: percent % 5))]
    share = side / edge
    # The size before the crop is recovered as floor(side / share), which a rounding error would make one less.
    options = (*usual, share, math.nextafter(share, 0))
    return next(option for option in options if math.floor(side / option) == edge)


def _cut_differently(large: int, side: int) -> bool:
    """Whether the centre of `side` pixels of `large` begins elsewhere in transformers than in torchvision."""
    # Half of 3 is 1.5: torchvision rounds it to the even 2, transformers down. Of 0.5, half of 1, both make 0.
    return (large - side) % 4 == 3
