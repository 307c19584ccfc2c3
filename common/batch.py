"""Sample and Batch: what datasets hand to models."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

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
    samples: B samples; as collated, their images are views of `images` without the padding
    joined:  {field of TENSORS: the numbers of all samples}, of which the samples have views. It is
             there after a transport from a worker, and in pinned memory
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
        joined = self.joined or self._join()
        self.joined = {name: numbers.pin_memory() for name, numbers in joined.items()}
        return self

    def to(self, device: torch.device) -> "Batch":
        """Moves `images` and the TENSORS of all samples to a device, in place; not their `image`.

        From pinned memory there is one copy for each field, and the host does not wait for it.
        """
        self.images = self.images.to(device, non_blocking=True)
        for name in TENSORS:
            if name in self.joined:
                moved = self.joined[name].to(device, non_blocking=True)
                self._split(name, moved, self._shapes(name))
                continue
            for sample, value in zip(self.samples, self._values(name)):
                setattr(sample, name, value if value is None else value.to(device))
        return self

    def __getstate__(self) -> dict:
        """Returns what a worker sends to the main process: one tensor for each field.

        Each tensor that is sent costs a file descriptor and a map of memory.
        """
        joined = self.joined or self._join()
        shapes = {name: self._shapes(name) for name in joined}
        nothing = dict.fromkeys(("image", *TENSORS))
        samples = [replace(sample, **nothing) for sample in self.samples]
        return self.__dict__ | {"samples": samples, "joined": joined, "shapes": shapes}

    def __setstate__(self, state: dict) -> None:
        shapes = state.pop("shapes")
        self.__dict__.update(state)
        views = unpadded(self.images, self.sizes)
        for sample, view in zip(self.samples, views):
            sample.image = view
        for name, numbers in self.joined.items():
            self._split(name, numbers, shapes[name])

    def _join(self) -> dict[str, Tensor]:
        """Returns {field: the numbers of all samples, end to end}, of the fields that have some."""
        joined = {}
        for name in TENSORS:
            values = [value.flatten() for value in self._values(name) if value is not None]
            if values:
                count = sum(map(len, values))
                target = shared_zeros((count,), values[0].dtype)
                joined[name] = torch.cat(values, out=target)
        return joined

    def _split(self, name: str, numbers: Tensor, shapes: list[torch.Size | None]) -> None:
        """Gives each sample its part of `numbers` as field `name`. None stays None."""
        sizes = [0 if shape is None else shape.numel() for shape in shapes]
        for sample, part, shape in zip(self.samples, numbers.split(sizes), shapes):
            value = None if shape is None else part.view(shape)
            setattr(sample, name, value)

    def _shapes(self, name: str) -> list[torch.Size | None]:
        return [None if value is None else value.shape for value in self._values(name)]

    def _values(self, name: str) -> list[Tensor | None]:
        return [getattr(sample, name) for sample in self.samples]


def shared_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Makes zeros that a worker can send without a copy. Returns None in the main process."""
    if get_worker_info() is None:
        return None
    size = math.prod(shape) * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(size)  # as torch's default_collate; new pages are 0
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


def unpadded(images: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """Returns views of images (B, 3, H, W): (3, height, width) each, without the padding."""
    return [image[:, :height, :width] for image, (height, width) in zip(images, sizes)]


def collate(
    samples: list[Sample], divisor: int = 32, least: dict[str, tuple[int, int]] | None = None
) -> Batch:
    """Pads samples to one size, whose height and width are multiples of `divisor`.

    least: {dataset: (height, width)}; pads to at least this size, so that batches have one shape
    """
    sizes = [sample.size for sample in samples]
    shapes = sizes + [least[sample.dataset] for sample in samples] if least else sizes
    heights, widths = zip(*shapes)
    height = divisor * math.ceil(max(heights) / divisor)
    width = divisor * math.ceil(max(widths) / divisor)
    shape = (len(samples), 3, height, width)
    images = shared_zeros(shape, torch.uint8)
    if images is None:
        images = torch.from_numpy(np.zeros(shape, np.uint8))  # torch's zeros fill the padding, too
    views = unpadded(images, sizes)
    for sample, view in zip(samples, views):
        # numpy is faster than torch if the channels of a pixel are neighbours
        np.copyto(view.numpy(), sample.image.numpy())
    samples = [replace(sample, image=view) for sample, view in zip(samples, views)]
    batch = Batch(images, sizes, samples)
    if get_worker_info():
        batch.joined = batch._join()  # an error of the thread that sends it would be a hang
    return batch
