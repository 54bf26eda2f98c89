"""The images an evaluation uses: which ones of a data set, checked, and read batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ..data import PixelDataset, as_pixel_dataset, collate, find_broken, listing, stratified_subset
from ..data.images import BrokenImageError
from ..pixels import check_pixels


class Samples:
    """The chosen images of a data set. They are read when they are needed, so that a large set need not fit in memory.

    Args:
        dataset: What [`as_pixel_dataset`] accepts, or a tuple or `TensorDataset` of pixels and labels.
        model (`nn.Module`): The model to be evaluated; its `preprocessing`, if it states one, is used.
        max_samples (`int`, *optional*): Size of a random subset with the class shares of the whole set.
        sample_indices (`Sequence[int]`, *optional*): Positions to use instead.
        seed (`int`): Seed of the subset.
        batch_size (`int`): Images read at once.

    Attributes:
        indices (`list[int]`): Positions of the chosen images in the data set.
        labels (`Tensor`): Their class indices, N, on the CPU.
        dataset_size (`int`): Number of images in the data set.
        notes (`list[str]`): What a reader of the results has to know about the images.
    """

    def __init__(
        self,
        dataset: Any,
        model: nn.Module,
        max_samples: int | None = None,
        sample_indices: Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int = 128,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a positive integer, got {batch_size!r}.")
        self.batch_size = batch_size
        preprocessing = getattr(model, "preprocessing", None)
        if isinstance(dataset, TensorDataset):
            dataset = dataset.tensors
        self.tensors: Tensor | None = None
        if isinstance(dataset, tuple):
            self.tensors, labels = _checked_tensors(dataset, preprocessing.image_size if preprocessing else None)
        else:
            if preprocessing is not None:
                dataset = as_pixel_dataset(dataset, preprocessing, name="dataset")
            elif not hasattr(dataset, "labels"):
                raise TypeError(
                    "A plain module states no preprocessing, so `dataset` must be (pixels, labels), a TensorDataset "
                    f"or the result of `as_pixel_dataset(source, preprocessing)`, got {type(dataset).__name__}."
                )
            if isinstance(dataset, PixelDataset):
                # A training set would give another image at every reading, and other images for broken ones.
                dataset = dataset.select(range(len(dataset)), augmentation="none", broken_images="raise")
            labels = torch.as_tensor(dataset.labels, dtype=torch.long)
        self.source = dataset
        self.dataset_size = len(labels)
        if self.dataset_size == 0:
            raise ValueError("`dataset` is empty.")
        self.notes: list[str] = []
        self.indices = _choose(labels.tolist(), max_samples, sample_indices, seed)
        # Images that were asked for one by one are all needed.
        if isinstance(dataset, PixelDataset) and sample_indices is None:
            self._leave_out_broken(dataset)
        self.labels = labels[self.indices]

    def _leave_out_broken(self, dataset: PixelDataset) -> None:
        """Leaves out images that cannot be read: another one in their place would be counted twice."""
        broken = find_broken(dataset, self.indices)
        if not broken:
            return
        found = f"{len(broken)} of {len(self.indices)} images cannot be read: {listing(dataset, broken)}."
        if len(broken) == len(self.indices):
            raise BrokenImageError(f"{found} Nothing is left to evaluate.")
        self.notes.append(f"{found} They are left out of every figure.")
        self.indices = sorted(set(self.indices) - set(broken))

    def __len__(self) -> int:
        return len(self.indices)

    def split(self, positions: Tensor) -> list[Tensor]:
        """Positions among the chosen images, of which there may be none, a full batch at a time."""
        # `Tensor.split` gives one empty batch for no positions.
        return list(positions.split(self.batch_size)) if len(positions) else []

    def read(self, batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Float32 pixels in [0, 1], N x C x H x W, and labels, N, of a batch.

        Args:
            batch (`Tensor`): Positions among the chosen images, on the CPU.
            device (`torch.device`): Where the pixels and labels go.
        """
        rows = self.rows(batch)
        if self.tensors is not None:
            pixels = self.tensors[rows]
        else:
            pixels = collate([self.source[row] for row in rows])["pixel_values"]
        # `check_pixels` lets rounding errors pass, attack libraries do not.
        return pixels.to(device, torch.float32).clamp(0, 1), self.labels[batch].to(device)

    def rows(self, batch: Tensor) -> list[int]:
        """The positions in the data set of a batch of positions among the chosen images."""
        return [self.indices[position] for position in batch.tolist()]

    def check_labels(self, num_classes: int) -> None:
        """Raises `ValueError` with the counts if a label is outside 0 .. `num_classes` - 1."""
        outside = self.labels[(self.labels < 0) | (self.labels >= num_classes)]
        if len(outside):
            values, counts = outside.unique(return_counts=True)
            found = ", ".join(f"{v} ({n} x)" for v, n in zip(values[:5].tolist(), counts.tolist(), strict=False))
            raise ValueError(
                f"{len(outside)} of {len(self)} labels are outside 0 .. {num_classes - 1}, the classes of this model: "
                f"{found}{', ...' if len(values) > 5 else ''}. Renumber them as in training, or measure a model that "
                "has these classes."
            )


def sample_digest(pixels: Tensor, label: int) -> str:
    """Twelve hexadecimal digits of the SHA-256 of an image (C x H x W, in [0, 1]) in 8 bits, and its label."""
    content = (pixels * 255).round().to(torch.uint8).contiguous().numpy().tobytes()
    return hashlib.sha256(content + str(label).encode()).hexdigest()[:12]


def _checked_tensors(tensors: tuple[Any, ...], image_size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    if len(tensors) != 2:
        raise ValueError(f"`dataset` must be the two tensors (pixels, labels), got {len(tensors)}.")
    pixels, labels = tensors
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"`labels` must be an integer tensor of class indices, got {kind}.")
    check_pixels(pixels, image_size=image_size)
    if labels.ndim != 1 or len(labels) != len(pixels):
        raise ValueError(f"`labels` must have one class index an image, {len(pixels)}, got {tuple(labels.shape)}.")
    return pixels.detach(), labels.detach().cpu().long()


def _choose(labels: list[int], max_samples: int | None, sample_indices: Sequence[int] | None, seed: int) -> list[int]:
    if sample_indices is None:
        if max_samples is None:
            return list(range(len(labels)))
        if isinstance(max_samples, bool) or not isinstance(max_samples, int) or max_samples < 1:
            raise ValueError(f"`max_samples` must be a positive integer, got {max_samples!r}.")
        return stratified_subset(labels, max_samples, seed)
    if max_samples is not None:
        raise ValueError("Give `max_samples` or `sample_indices`, not both.")
    indices = [int(index) for index in sample_indices]
    if not indices:
        raise ValueError("`sample_indices` is empty.")
    if min(indices) < 0 or max(indices) >= len(labels):
        raise ValueError(f"`sample_indices` must be in 0 .. {len(labels) - 1}, got {min(indices)} .. {max(indices)}.")
    if len(set(indices)) < len(indices):
        raise ValueError("`sample_indices` has duplicates, which would make the confidence interval too narrow.")
    return indices
