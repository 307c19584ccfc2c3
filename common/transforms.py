"""Augmentations of samples, made of torchvision.transforms.v2 and its tv_tensors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from common.batch import Sample
from common.boxes import sides
from common.colors import change_colors
from common.masks import drop_unseen, have_pixels

WHOLE = (slice(None), slice(None))  # all rows and columns


@dataclass
class LargeScaleJitter:
    """Resizes by a random scale, crops to at most `size` x `size`, flips. EfficientDet's jitter.

    At a scale of 1 the long side is `size`. The crop has no padding: `collate` pads.
    by_mask: as in `move`
    Source: facebookresearch/Detic:detic/data/transforms (custom_augmentation_impl.py,
    custom_transform.py).
    """

    size: int
    scale: tuple[float, float] = (0.1, 2.0)
    flip: float = 0.5
    by_mask: bool = False

    def __call__(self, sample: Sample) -> Sample:
        scale = uniform(*self.scale)
        longest = scale * self.size
        size = shortest_size(sample.size, math.inf, longest)  # only the long side is limited
        window = random_window(size, (self.size, self.size))
        flip = coin(self.flip)
        return move(sample, size, window, flip, self.by_mask)


@dataclass
class SegmentationCrop:
    """Resizes the short side, crops, jitters the colours, flips. For semantic segmentation.

    short:    lengths of the short side in pixels, sampled with equal probability
    crop:     (height, width) of the crop; a smaller image stays whole. `collate` pads it. The
              padding is 0 after normalisation, close to the grey (128) of the released LMSeg.
    max_side: limit of the long side in pixels
    Source: mightyzau/LMSeg, facebookresearch/MaskFormer (mask_former_semantic_dataset_mapper.py).
    """

    short: tuple[int, ...]
    crop: tuple[int, int]
    max_side: int
    color_jitter: bool = True
    flip: float = 0.5

    def __call__(self, sample: Sample) -> Sample:
        short = choice(self.short)
        size = shortest_size(sample.size, short, self.max_side)
        window = random_window(size, self.crop)
        flip = coin(self.flip)
        sample = move(sample, size, window, flip)
        if self.color_jitter:
            image = jitter_colors(sample.image)
            sample = replace(sample, image=image)
        return sample


@dataclass
class DetrCrop:
    """Resizes the short side to 480, 512, ..., 800, the long side to at most 1333, flips.

    Half of the images are cropped before: they are resized to a short side of 400, 500 or 600, and
    the sides of the crop are 384 to 600. All numbers are for a `size` of 800 and scale with it.
    DETR's augmentation. Source: facebookresearch/MaskFormer (detr_panoptic_dataset_mapper.py).
    """

    size: int = 800
    flip: float = 0.5

    def __call__(self, sample: Sample) -> Sample:
        flip = coin(self.flip)
        if coin(0.5):
            short = choice((400, 500, 600))
            size = shortest_size(sample.size, self.scaled(short))
            height = self.random_side(size[0])
            width = self.random_side(size[1])
            window = random_window(size, (height, width))
            sample = move(sample, size, window)
        short = choice(range(480, 801, 32))
        longest = self.scaled(1333)
        size = shortest_size(sample.size, self.scaled(short), longest)
        return move(sample, size, flip=flip)

    def random_side(self, length: int) -> int:
        """Samples the side of a crop of an image whose side is `length`."""
        low = min(length, self.scaled(384))
        high = min(length, self.scaled(600))
        return randint(low, high + 1)

    def scaled(self, length: int) -> int:
        """Returns a length for images of `size`, given the length for images of 800."""
        length = round(length * self.size / 800)
        return max(1, length)


@dataclass
class ResizeShortest:
    """Resizes a sample: its image, boxes, masks and proposals, as detectron2 at test time.

    The short side becomes `size`, or less if the long side would exceed `longest`.
    `longest` = 0 means size * 1333 / 800.
    """

    size: int
    longest: int = 0

    def __call__(self, sample: Sample) -> Sample:
        longest = self.longest or self.size * 1333 / 800
        size = shortest_size(sample.size, self.size, longest)
        return move(sample, size)


@dataclass
class ResizeShortestRange:
    """Resizes the short side to a random integer from `low` to `high`, flips.

    The long side is at most high * 1333 / 800. Source: the multi-scale training of mmdetection
    (Resize, multiscale_mode="range").
    """

    low: int
    high: int
    flip: float = 0.5

    def __call__(self, sample: Sample) -> Sample:
        short = randint(self.low, self.high + 1)
        longest = self.high * 1333 / 800
        size = shortest_size(sample.size, short, longest)
        flip = coin(self.flip)
        return move(sample, size, flip=flip)


def coin(probability: float) -> bool:
    """Returns True with this probability."""
    return bool(torch.rand(()) < probability)


def uniform(low: float, high: float) -> float:
    """Samples a number between `low` and `high`."""
    number = torch.empty(())
    number.uniform_(low, high)
    return number.item()


def randint(low: int, end: int) -> int:
    """Samples an integer from `low` to `end` - 1."""
    return int(torch.randint(low, end, ()))


def choice(values: Sequence[int]) -> int:
    """Samples one of the values with equal probability."""
    index = randint(0, len(values))
    return values[index]


def random_corner(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    """Samples (top, left) of a crop (height, width) in an image of `size`."""
    rows = size[0] - crop[0]
    columns = size[1] - crop[1]
    top = randint(0, rows + 1)
    left = randint(0, columns + 1)
    return top, left


def random_window(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int, int, int]:
    """Samples (top, left, height, width) of a crop of at most `crop` in an image of `size`."""
    height = min(crop[0], size[0])
    width = min(crop[1], size[1])
    top, left = random_corner(size, (height, width))
    return top, left, height, width


def shortest_size(
    size: tuple[int, int], short: float, longest: float = math.inf
) -> tuple[int, int]:
    """Returns (height, width) in proportion to `size`, as large as the two limits allow.

    The short side is at most `short` and the long side at most `longest`.
    """
    short_factor = short / min(size)
    long_factor = longest / max(size)
    factor = min(short_factor, long_factor)
    height = round(size[0] * factor)
    width = round(size[1] * factor)
    return max(1, height), max(1, width)


def apply(sample: Sample, transform: Callable[[Tensor], Tensor]) -> Sample:
    """Applies one torchvision v2 functional to the image, the boxes and the proposals."""

    def apply_to_boxes(boxes: Tensor) -> Tensor:
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=sample.size)
        boxes = transform(boxes)
        return boxes.as_subclass(Tensor)

    image = tv_tensors.Image(sample.image)
    image = transform(image).as_subclass(Tensor)
    boxes = apply_to_boxes(sample.boxes)
    proposals = sample.proposals
    if proposals is not None:
        proposals = apply_to_boxes(proposals)
    return replace(sample, image=image, boxes=boxes, proposals=proposals)


def move(
    sample: Sample,
    size: tuple[int, int],
    window: tuple[int, int, int, int] | None = None,
    flip: bool = False,
    by_mask: bool = False,
) -> Sample:
    """Resizes a sample, crops it, and mirrors it from left to right.

    What is no longer in the image is dropped: objects, segments, proposals.
    size:    (height, width) to resize to
    window:  (top, left, height, width) of the crop after that
    by_mask: an object is dropped when its mask has no pixel left, as segmenters do; else when its
             box is empty, as detectors do. An object without a mask goes by its box
    """
    top, left, height, width = window or (0, 0, *size)
    if sample.size != size:
        sample = apply(sample, lambda x: F.resize(x, list(size), antialias=True))
    if (height, width) != size:
        sample = apply(sample, lambda x: F.crop(x, top, left, height, width))
    if flip:
        sample = apply(sample, F.horizontal_flip)
    rows = slice(top, top + height)
    columns = slice(left, left + width)
    part = (rows, columns)
    labels = sample.labels
    if sample.segments is not None:
        segments = resize_map(sample.segments, size, part, flip)
        segments, labels = drop_unseen(segments, labels)
        return replace(sample, segments=segments, labels=labels)
    proposals = sample.proposals
    if proposals is not None:
        proposals = proposals[not_empty(proposals)]
    kept = not_empty(sample.boxes)
    masks = sample.masks
    if masks is not None:
        old_masks = masks[kept]
        masks = resize_masks(old_masks, size, part, flip)
        if by_mask:
            only_box = ~have_pixels(old_masks)
            seen = have_pixels(masks) | only_box
            masks = masks[seen]
            kept[kept.clone()] = seen
    boxes = sample.boxes[kept]
    labels = labels[kept]
    return replace(sample, boxes=boxes, labels=labels, masks=masks, proposals=proposals)


def resize_map(
    pixels: Tensor, size: tuple[int, int], window: tuple[slice, slice] = WHOLE, flip: bool = False
) -> Tensor:
    """Resizes a map (H, W) to `size` by nearest pixels, crops rows and columns, mirrors."""
    rows, columns = _sources(pixels.shape, size, window, flip)
    # numpy's take is several times as fast as indexing in torch
    resized = pixels.numpy().take(columns, 1)
    resized = resized.take(rows, 0)
    return torch.from_numpy(resized)


def resize_masks(
    masks: Tensor, size: tuple[int, int], window: tuple[slice, slice] = WHOLE, flip: bool = False
) -> Tensor:
    """Resizes masks (N, H, W) bool as `resize_map`. Most fill a small part, and only it is read."""
    rows, columns = _sources(masks.shape[1:], size, window, flip)
    resized = np.zeros((len(masks), len(rows), len(columns)), bool)
    for old, new in zip(masks.numpy(), resized):
        high = np.flatnonzero(old.any(1)[rows])  # the new rows that may have a pixel
        wide = np.flatnonzero(old.any(0)[columns])
        if not len(high) or not len(wide):
            continue
        part = (slice(high[0], high[-1] + 1), slice(wide[0], wide[-1] + 1))
        first = rows[high[0]]
        last = rows[high[-1]]
        read = old[first : last + 1].take(columns[part[1]], 1)
        new[part] = read.take(rows[part[0]] - first, 0)
    return torch.from_numpy(resized)


def _sources(
    old: tuple[int, int], new: tuple[int, int], window: tuple[slice, slice], flip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the old row of each new row, and the same of the columns. See `resize_map`."""
    rows = nearest_pixels(old[0], new[0])[window[0]]
    columns = nearest_pixels(old[1], new[1])[window[1]]
    return rows, columns[::-1] if flip else columns


def nearest_pixels(old: int, new: int) -> np.ndarray:
    """Returns the nearest of `old` pixels for each of `new`: floor((i + 0.5) * old / new)."""
    half_pixels = 2 * np.arange(new) + 1
    return half_pixels * old // (2 * new)


def not_empty(boxes: Tensor, min_side: float = 1e-5) -> Tensor:
    """Returns (N,) bool: which boxes (N, 4) have an area (detectron2's filter_empty_instances)."""
    return sides(boxes).amin(1) >= min_side


def jitter_colors(image: Tensor) -> Tensor:
    """Changes brightness, contrast, saturation and hue of (3, H, W) uint8, each half of the time.

    Source: facebookresearch/detectron2:projects/PointRend/point_rend/color_augmentation.py (SSD's).
    """
    brightness = uniform(-32, 32) if coin(0.5) else 0.0
    contrast = uniform(0.5, 1.5) if coin(0.5) else 1.0
    contrast_last = coin(0.5)
    saturation = uniform(0.5, 1.5) if coin(0.5) else 1.0
    turn = uniform(-0.1, 0.1) if coin(0.5) else 0.0  # 18 of 180 degrees, as OpenCV counts them
    return change_colors(image, brightness, contrast, contrast_last, saturation, turn)
