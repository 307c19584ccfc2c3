"""Augmentations on samples, made of torchvision.transforms.v2 and its tv_tensors."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
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
        masks, sample = sample.masks, replace(sample, masks=None)
        sample = resize(sample, (max(1, round(height * factor)), max(1, round(width * factor))))
        height, width = sample.size
        crop = (min(self.size, height), min(self.size, width))
        top = int(torch.randint(height - crop[0] + 1, ()))
        left = int(torch.randint(width - crop[1] + 1, ()))
        sample = apply(sample, lambda x: F.crop(x, top, left, *crop))
        flip = bool(torch.rand(()) < self.flip)
        if flip:
            sample = apply(sample, F.horizontal_flip)
        if masks is not None:  # in one go and of what is left: the whole resized image may be four times as large
            window = slice(top, top + crop[0]), slice(left, left + crop[1])
            masks = resize_masks(masks[not_empty(sample.boxes)], (height, width), window, flip)
        return replace(drop_empty(sample), masks=masks)


@dataclass
class ResizeShortest:
    """Short side to `size`, long side at most `size` * 1333 / 800: the test transform of detectron2."""

    size: int

    def __call__(self, sample: Sample) -> Sample:
        return resize_shortest(sample, self.size, self.size)


@dataclass
class ResizeShortestRange:
    """Short side to a random whole number of [low, high], long side at most high * 1333 / 800, then a flip.

    Source: the multi-scale training of mmdetection (Resize, multiscale_mode="range").
    """

    low: int
    high: int
    flip: float = 0.5

    def __call__(self, sample: Sample) -> Sample:
        sample = resize_shortest(sample, int(torch.randint(self.low, self.high + 1, ())), self.high)
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
    """Image, boxes and masks to `size`, a height and a width."""
    if sample.size == size:
        return sample
    masks = None if sample.masks is None else resize_masks(sample.masks, size)
    sample = apply(replace(sample, masks=None), lambda x: F.resize(x, list(size), antialias=True))
    return replace(sample, masks=masks)


def resize_shortest(sample: Sample, short: int, high: int) -> Sample:
    """Short side to `short`, long side at most `high` * 1333 / 800."""
    height, width = sample.size
    factor = min(short / min(height, width), high * 1333 / 800 / max(height, width))
    return resize(sample, (max(1, round(height * factor)), max(1, round(width * factor))))


ALL = (slice(None), slice(None))


def resize_masks(masks: Tensor, size: tuple[int, int], window: tuple[slice, slice] = ALL, flip: bool = False) -> Tensor:
    """(N, H, W) bool resized to `size`, cut to the rows and columns of `window`, flipped: the nearest source pixels."""
    rows, columns = (
        (2 * np.arange(new)[part] + 1) * old // (2 * new)  # floor((i + 0.5) * old / new), exactly
        for old, new, part in zip(masks.shape[1:], size, window)
    )
    # numpy's take is several times as fast as indexing in torch
    return torch.from_numpy(masks.numpy().take(columns[::-1] if flip else columns, 2).take(rows, 1))


def not_empty(boxes: Tensor, min_side: float = 1e-5) -> Tensor:
    """(N,) bool: the boxes (N, 4) of which a crop left something (detectron2's filter_empty_instances)."""
    return (boxes[:, 2:] - boxes[:, :2]).amin(1) >= min_side


def drop_empty(sample: Sample) -> Sample:
    """Remove boxes that the crop left empty, with their labels and masks."""
    kept = not_empty(sample.boxes)
    masks = None if sample.masks is None else sample.masks[kept]
    return replace(sample, boxes=sample.boxes[kept], labels=sample.labels[kept], masks=masks)
