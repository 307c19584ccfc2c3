"""Sample and Batch: what datasets hand to models."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from common.datasets.known import Supervision

TENSORS = ("boxes", "labels", "masks", "segments", "image_labels", "proposals")


@dataclass
class Sample:
    """One image with its ground truth.

    image:         (3, H, W) uint8 RGB
    dataset:       name of the dataset; `labels` are meaningless without it
    supervision:   which of the fields below carry the ground truth
    image_id:      the dataset's own id
    index:         row of the image in its dataset
    original_size: (height, width) of the file, before any transform
    boxes:         (N, 4) float32 xyxy, absolute pixels of `image`
    labels:        (N,) int64, index into the vocabulary of `dataset`
    masks:         (N, H, W) bool; one without a pixel says that the object has only a box. Or None
    segments:      (H, W) int16, or None: for each pixel the row of its segment in `labels`, or -1
                   for unlabelled, void and crowd. `labels` has one row per class in the image
                   ("semantic") or per segment ("panoptic"). There are no masks and boxes then.
    image_labels:  (K,) int64, classes that are somewhere in the image, or None
    captions:      sentences about the image
    proposals:     (Q, 4) float32 xyxy, boxes of a frozen localizer in pixels of `image`, or None
    draw:          in training, the number of the draw, on which the augmentation depends
    file_name:     in training, the path of the image in its dataset
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
    draw: int = -1
    file_name: str = ""

    @classmethod
    def unlabelled(cls, image: Tensor, dataset: str, image_id: int | str, index: int) -> "Sample":
        """Returns a sample of an image (3, H, W) without ground truth."""
        size = tuple(image.shape[-2:])
        boxes = torch.zeros(0, 4)
        labels = torch.zeros(0, dtype=torch.long)
        return cls(image, dataset, "boxes", image_id, index, size, boxes, labels)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of `image`."""
        return tuple(self.image.shape[-2:])


@dataclass
class Batch:
    """Images of one size, padded with zeros at the right and at the bottom.

    images:  (B, 3, H, W) uint8
    sizes:   B pairs (height, width), before padding
    samples: B samples; their images are views of `images` without the padding
    joined:  {field of TENSORS: the numbers of all samples, in pinned memory}
    """

    images: Tensor
    sizes: list[tuple[int, int]]
    samples: list[Sample]
    joined: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def pin_memory(self) -> "Batch":
        """Pins the images and `joined` in memory. DataLoader calls it."""
        self.images = self.images.pin_memory()
        for name in TENSORS:
            values = [value for value in self._values(name) if value is not None]
            if values:
                self.joined[name] = torch.cat([v.flatten() for v in values]).pin_memory()
        return self

    def to(self, device: torch.device) -> "Batch":
        """Moves the images and the tensors of all samples to a device, in place.

        From pinned memory there is one copy for each field, and the host does not wait for it.
        """
        self.images = self.images.to(device, non_blocking=True)
        for name in TENSORS:
            values = self._values(name)
            if name in self.joined:
                sizes = [0 if value is None else value.numel() for value in values]
                moved = self.joined[name].to(device, non_blocking=True).split(sizes)
                values = [v if v is None else m.view_as(v) for v, m in zip(values, moved)]
            for sample, value in zip(self.samples, values):
                setattr(sample, name, value if value is None else value.to(device))
        return self

    def _values(self, name: str) -> list[Tensor | None]:
        return [getattr(sample, name) for sample in self.samples]


def collate(
    samples: list[Sample], divisor: int = 32, square: dict[str, int] | None = None
) -> Batch:
    """Pads samples to one size, whose height and width are multiples of `divisor`.

    square: {dataset: side}; pads to at least side x side, so that batches have one shape
    """
    sizes = [sample.size for sample in samples]
    heights, widths = zip(*sizes)
    least = max(square[sample.dataset] for sample in samples) if square else 0
    height = divisor * math.ceil(max(*heights, least) / divisor)
    width = divisor * math.ceil(max(*widths, least) / divisor)
    images = samples[0].image.new_zeros(len(samples), 3, height, width)
    views = []
    for sample, image, (h, w) in zip(samples, images, sizes):
        view = image[:, :h, :w]
        view.copy_(sample.image)
        views.append(replace(sample, image=view))
    return Batch(images, sizes, views)
