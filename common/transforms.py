"""Augmentations on samples, made of torchvision.transforms.v2 and its tv_tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from common.batch import Sample
from common.masks import drop_unseen


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
        factor = uniform(*self.scale) * self.size / max(height, width)
        height, width = max(1, round(height * factor)), max(1, round(width * factor))
        crop = (min(self.size, height), min(self.size, width))
        corner = random_corner((height, width), crop)
        return move(sample, (height, width), (*corner, *crop), coin(self.flip))


@dataclass
class SegmentationCrop:
    """Short side to one of `short`, random crop, colour jitter, flip: the augmentation of semantic segmentation.

    short:    lengths in pixels, drawn with equal probability; max_side: the longest that the long side becomes
    crop:     at most (height, width); a smaller image stays whole. The batch pads it with what is zero after
              normalisation, about the grey (128) of the released LMSeg.
    Source: mightyzau/LMSeg, facebookresearch/MaskFormer (mask_former_semantic_dataset_mapper.py).
    """

    short: tuple[int, ...]
    crop: tuple[int, int]
    max_side: int
    color_jitter: bool = True
    flip: float = 0.5

    def __call__(self, sample: Sample) -> Sample:
        size = shortest_size(sample.size, choice(self.short), self.max_side)
        crop = min(self.crop[0], size[0]), min(self.crop[1], size[1])
        sample = move(sample, size, (*random_corner(size, crop), *crop), coin(self.flip))
        return replace(sample, image=jitter_colors(sample.image)) if self.color_jitter else sample


@dataclass
class DetrCrop:
    """Short side to 480, 512, ..., 800, at most 1333 wide, half of the time after a random crop: DETR's augmentation.

    The crop is of the image with a short side of 400, 500 or 600; its sides are 384 to 600. All numbers are for a
    `size` of 800 and scale with it. Source: facebookresearch/MaskFormer (detr_panoptic_dataset_mapper.py).
    """

    size: int = 800
    flip: float = 0.5

    def __call__(self, sample: Sample) -> Sample:
        scaled = lambda length: max(1, round(length * self.size / 800))  # noqa: E731
        flip, low, high = coin(self.flip), scaled(384), scaled(600)
        if coin(0.5):
            size = shortest_size(sample.size, scaled(choice((400, 500, 600))))
            crop = tuple(
                int(torch.randint(min(side, low), min(side, high) + 1, ())) for side in size
            )
            sample = move(sample, size, (*random_corner(size, crop), *crop))
        short = scaled(choice(range(480, 801, 32)))
        return move(sample, shortest_size(sample.size, short, scaled(1333)), flip=flip)


@dataclass
class ResizeShortest:
    """Short side to `size`, long side at most `longest`, or `size` * 1333 / 800: the test transform of detectron2."""

    size: int
    longest: int = 0

    def __call__(self, sample: Sample) -> Sample:
        return move(
            sample, shortest_size(sample.size, self.size, self.longest or self.size * 1333 / 800)
        )


@dataclass
class ResizeShortestRange:
    """Short side to a random whole number of [low, high], long side at most high * 1333 / 800, then a flip.

    Source: the multi-scale training of mmdetection (Resize, multiscale_mode="range").
    """

    low: int
    high: int
    flip: float = 0.5

    def __call__(self, sample: Sample) -> Sample:
        short = int(torch.randint(self.low, self.high + 1, ()))
        return move(
            sample, shortest_size(sample.size, short, self.high * 1333 / 800), flip=coin(self.flip)
        )


def coin(probability: float) -> bool:
    return bool(torch.rand(()) < probability)


def choice(values: Sequence[int]) -> int:
    return values[int(torch.randint(len(values), ()))]


def random_corner(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    """Top and left of a crop (height, width) somewhere in `size`."""
    return int(torch.randint(size[0] - crop[0] + 1, ())), int(
        torch.randint(size[1] - crop[1] + 1, ())
    )


def shortest_size(
    size: tuple[int, int], short: float, longest: float = math.inf
) -> tuple[int, int]:
    """(height, width) in proportion to `size`, the shorter one `short`, but the longer one at most `longest`."""
    factor = min(short / min(size), longest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def apply(sample: Sample, transform) -> Sample:
    """Applies one torchvision v2 functional to the image, the boxes and the proposals."""

    def apply_to_boxes(boxes: Tensor) -> Tensor:
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=sample.size)
        return transform(boxes).as_subclass(torch.Tensor)

    image = transform(tv_tensors.Image(sample.image)).as_subclass(torch.Tensor)
    proposals = sample.proposals
    if proposals is not None:
        proposals = apply_to_boxes(proposals)
    return replace(sample, image=image, boxes=apply_to_boxes(sample.boxes), proposals=proposals)


def move(
    sample: Sample,
    size: tuple[int, int],
    window: tuple[int, int, int, int] | None = None,
    flip: bool = False,
) -> Sample:
    """Resize to `size`, cut out the `window` (top, left, height, width), flip; what is not seen any more is dropped.

    Image, boxes, masks and segments alike; the latter two in one go, of what the window leaves.
    """
    top, left, height, width = window or (0, 0, *size)
    masks, segments, labels = sample.masks, sample.segments, sample.labels
    if sample.size != size:
        sample = apply(sample, lambda x: F.resize(x, list(size), antialias=True))
    if (height, width) != size:
        sample = apply(sample, lambda x: F.crop(x, top, left, height, width))
    sample = apply(sample, F.horizontal_flip) if flip else sample
    part = slice(top, top + height), slice(left, left + width)
    if segments is not None:
        segments, labels = drop_unseen(resize_masks(segments[None], size, part, flip)[0], labels)
        return replace(sample, segments=segments, labels=labels)
    if sample.proposals is not None:
        sample = replace(sample, proposals=sample.proposals[not_empty(sample.proposals)])
    kept = not_empty(sample.boxes)
    if masks is not None:
        masks = resize_masks(masks[kept], size, part, flip)
        seen = masks.flatten(1).any(1)  # a crop of a box may hold nothing of its mask
        masks, kept[kept.clone()] = masks[seen], seen
    return replace(sample, boxes=sample.boxes[kept], labels=labels[kept], masks=masks)


def jitter_colors(image: Tensor) -> Tensor:
    """(3, H, W) uint8 in other colours: brightness, contrast, saturation, hue, each half of the time, as SSD jitters.

    Source: facebookresearch/detectron2:projects/PointRend/point_rend/color_augmentation.py.
    """
    image = image.float()
    if coin(0.5):
        image = (image + uniform(-32, 32)).clamp(0, 255)
    contrast, late = uniform(0.5, 1.5) if coin(0.5) else 1.0, coin(0.5)
    image = image if late else (image * contrast).clamp(max=255)
    if coin(0.5):  # saturation of HSV: the distance of the channels to the largest one
        most, least = image.amax(0), image.amin(0)
        image = most - (most - image) * (most / (most - least).clamp(min=1e-3)).clamp(
            max=uniform(0.5, 1.5)
        )
    if coin(0.5):
        image = (
            F.adjust_hue(image / 255, uniform(-0.1, 0.1)) * 255
        )  # 18 of 180 degrees, as OpenCV counts them
    return (image * contrast if late else image).clamp(0, 255).round().byte()


def uniform(low: float, high: float) -> float:
    return torch.empty(()).uniform_(low, high).item()


ALL = (slice(None), slice(None))


def resize_masks(
    masks: Tensor, size: tuple[int, int], window: tuple[slice, slice] = ALL, flip: bool = False
) -> Tensor:
    """(N, H, W) resized to `size`, cut to the rows and columns of `window`, flipped: the nearest source pixels."""
    rows, columns = (
        (2 * np.arange(new)[part] + 1) * old // (2 * new)  # floor((i + 0.5) * old / new), exactly
        for old, new, part in zip(masks.shape[1:], size, window)
    )
    # numpy's take is several times as fast as indexing in torch
    return torch.from_numpy(masks.numpy().take(columns[::-1] if flip else columns, 2).take(rows, 1))


def not_empty(boxes: Tensor, min_side: float = 1e-5) -> Tensor:
    """(N,) bool: the boxes (N, 4) of which a crop left something (detectron2's filter_empty_instances)."""
    return (boxes[:, 2:] - boxes[:, :2]).amin(1) >= min_side
