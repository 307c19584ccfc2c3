"""Augmentations on samples, made of torchvision.transforms.v2 and its tv_tensors."""

from dataclasses import dataclass, replace

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from common.batch import Sample


@dataclass
class LargeScaleJitter:
    """Resize by a random scale, crop to at most `size` x `size`, flip: EfficientDet's jitter as Detic uses it.

    A scale of 1 makes the image just fit into the square; the crop has no padding (the batch pads).
    Source: facebookresearch/Detic:detic/data/transforms (custom_augmentation_impl.py, custom_transform.py).
    """

    size: int
    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5

    def __call__(self, sample: Sample) -> Sample:
        height, width = sample.size
        jitter = torch.empty(()).uniform_(*self.scale).item()
        factor = jitter * self.size / max(height, width)
        sample = resize(sample, (max(1, round(height * factor)), max(1, round(width * factor))))
        height, width = sample.size
        crop = (min(self.size, height), min(self.size, width))
        top = int(torch.randint(height - crop[0] + 1, ()))
        left = int(torch.randint(width - crop[1] + 1, ()))
        sample = apply(sample, lambda x: F.crop(x, top, left, *crop))
        if torch.rand(()) < self.flip:
            sample = apply(sample, F.horizontal_flip)
        return drop_empty(sample)


@dataclass
class ResizeShortest:
    """Short side to `size`, long side at most `size` * 1333 / 800: the test transform of detectron2."""

    size: int

    def __call__(self, sample: Sample) -> Sample:
        height, width = sample.size
        factor = min(self.size / min(height, width), self.size * 1333 / 800 / max(height, width))
        return resize(sample, (max(1, round(height * factor)), max(1, round(width * factor))))


@dataclass
class ResizeShortestRange:
    """Short side to a random whole number of [low, high], long side at most high * 1333 / 800, then a flip.

    Source: the multi-scale training of mmdetection (Resize, multiscale_mode="range").
    """

    low: int
    high: int
    flip: float = 0.5

    def __call__(self, sample: Sample) -> Sample:
        height, width = sample.size
        short = int(torch.randint(self.low, self.high + 1, ()))
        factor = min(short / min(height, width), self.high * 1333 / 800 / max(height, width))
        sample = resize(sample, (max(1, round(height * factor)), max(1, round(width * factor))))
        if torch.rand(()) < self.flip:
            sample = apply(sample, F.horizontal_flip)
        return drop_empty(sample)


def apply(sample: Sample, transform) -> Sample:
    """Apply one torchvision v2 functional to image, boxes and masks alike."""
    boxes = tv_tensors.BoundingBoxes(sample.boxes, format="XYXY", canvas_size=sample.size)
    masks = None if sample.masks is None else transform(tv_tensors.Mask(sample.masks)).as_subclass(torch.Tensor)
    return replace(
        sample,
        image=transform(tv_tensors.Image(sample.image)).as_subclass(torch.Tensor),
        boxes=transform(boxes).as_subclass(torch.Tensor),
        masks=masks,
    )


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    return sample if sample.size == size else apply(sample, lambda x: F.resize(x, list(size), antialias=True))


def drop_empty(sample: Sample, min_side: float = 1e-5) -> Sample:
    """Remove boxes that the crop left empty, with their labels and masks (detectron2's filter_empty_instances)."""
    kept = (sample.boxes[:, 2:] - sample.boxes[:, :2]).amin(1) >= min_side
    masks = None if sample.masks is None else sample.masks[kept]
    return replace(sample, boxes=sample.boxes[kept], labels=sample.labels[kept], masks=masks)
