"""Sample and Batch: the one contract between datasets and models."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Supervision = Literal["boxes", "instances", "semantic", "panoptic", "image_labels"]


@dataclass
class Sample:
    """One image with what its dataset says of it.

    image:         (3, H, W) uint8 RGB
    dataset:       name of the dataset; `labels` are meaningless without it
    supervision:   which of the fields below carry the ground truth
    image_id:      the dataset's own id
    index:         row of the image in its dataset
    original_size: (height, width) of the file, before any transform
    boxes:         (N, 4) float32 xyxy, absolute pixels of `image`
    labels:        (N,) int64, index into the vocabulary of `dataset`
    masks:         (N, H, W) bool, or None
    segments:      (H, W) int16, or None: the row of `labels` that each pixel belongs to, -1 unlabelled, void or crowd;
                   one row per class present ("semantic") or per segment ("panoptic"), without masks and boxes
    image_labels:  (K,) int64, classes that the image shows somewhere, or None
    captions:      sentences about the image
    proposals:     (Q, 4) float32 xyxy, absolute pixels of `image`, or None: a frozen localizer's
    """

    image: Tensor
    dataset: str
    supervision: Supervision
    image_id: int | str
    index: int
    original_size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None
    segments: Tensor | None = None
    image_labels: Tensor | None = None
    captions: tuple[str, ...] = ()
    proposals: Tensor | None = None

    @classmethod
    def unlabelled(cls, image: Tensor, dataset: str, image_id: int | str, index: int) -> "Sample":
        """An image (3, H, W) of which nothing is known."""
        none, size = torch.zeros(0, dtype=torch.long), tuple(image.shape[-2:])
        return cls(image, dataset, "boxes", image_id, index, size, torch.zeros(0, 4), none)

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.image.shape[-2:])


@dataclass
class Batch:
    """Images padded with zeros at the right and bottom, their true sizes, and the samples, whose images are views.

    images: (B, 3, H, W) uint8, H and W multiples of `divisor`
    sizes:  B pairs (height, width) before padding
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    samples: list[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def pin_memory(self) -> "Batch":
        self.images = self.images.pin_memory()
        return self

    def to(self, device: torch.device) -> "Batch":
        self.images = self.images.to(device, non_blocking=True)
        for sample in self.samples:
            for field in ("boxes", "labels", "masks", "segments", "image_labels", "proposals"):
                value = getattr(sample, field)
                if value is not None:
                    setattr(sample, field, value.to(device, non_blocking=True))
        return self


def collate(
    samples: list[Sample], divisor: int = 32, square: dict[str, int] | None = None
) -> Batch:
    """Pad a list of samples to one batch.

    square: {dataset: side} pads so far that its batches have one shape
    """
    sides = [s.size for s in samples] + (
        [(square[s.dataset],) * 2 for s in samples] if square else []
    )
    height, width = (-(-max(side) // divisor) * divisor for side in zip(*sides))
    sizes = [s.size for s in samples]
    images = torch.stack(
        [F.pad(s.image, (0, width - w, 0, height - h)) for s, (h, w) in zip(samples, sizes)]
    )
    views = [replace(s, image=image[:, :h, :w]) for s, image, (h, w) in zip(samples, images, sizes)]
    return Batch(images, sizes, views)
