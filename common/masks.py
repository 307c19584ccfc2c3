"""Instance masks: COCO's segmentations to pixels and back, and the square masks that heads of detectors see."""

import hotcoco
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from common.batch import Sample


def to_rle(segmentation: list | dict, size: tuple[int, int]) -> dict:
    """COCO polygons or an RLE of either kind -> a compressed RLE, {"size": [H, W], "counts": str or bytes}.

    The pixels are those of pycocotools; polygons of fewer than three points have none, as in detectron2.
    Raises ValueError for an RLE of another (height, width) than `size` or whose runs do not fill it, and for what is
    neither.
    """
    height, width = size
    try:
        if isinstance(segmentation, list):
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
            short = [x for polygon in segmentation if len(polygon) < 6 for x in polygon]
            if not all(isinstance(x, (int, float)) for x in short):
                raise TypeError("a polygon is a flat list of numbers x, y, x, y, ...")
            if polygons:
                return hotcoco.mask.merge(hotcoco.mask.frPyObjects(polygons, height, width))
            segmentation = {"size": [height, width], "counts": [height * width]}
        if tuple(segmentation["size"]) != (height, width):
            raise ValueError(
                f"an RLE of size {segmentation['size']} for an image of {[height, width]} (height, width)"
            )
        compressed = isinstance(segmentation["counts"], str | bytes)
        rle = segmentation if compressed else hotcoco.mask.frPyObjects(segmentation, height, width)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{str(segmentation)[:40]} is neither a list of polygons nor an RLE ({error})"
        ) from None
    area_of(rle)  # a ValueError if it cannot be read or its runs exceed the image
    try:
        area_of({"size": [1, height * width - 1], "counts": rle["counts"]})
    except ValueError:
        return rle  # its runs exceed one pixel less: they fill the image
    raise ValueError(f"an RLE whose counts sum to less than {height} x {width} pixels")


def decode_masks(segmentations: list, size: tuple[int, int]) -> Tensor:
    """N COCO polygons or RLEs -> (N, H, W) bool, size = (H, W). Raises ValueError as `to_rle`."""
    masks = torch.zeros(len(segmentations), *size, dtype=torch.bool)
    for mask, segmentation in zip(masks, segmentations):
        mask.copy_(torch.from_numpy(hotcoco.mask.decode(to_rle(segmentation, size)).view(bool)))
    return masks  # (N, H, W)


def encode_masks(masks: Tensor) -> list[dict]:
    """(N, H, W) bool -> N compressed RLEs as COCO's json files have them, {"size": [H, W], "counts": str}."""
    rles = [hotcoco.mask.encode(np.asarray(mask)) for mask in masks.cpu()]
    return [{"size": list(map(int, rle["size"])), "counts": rle["counts"].decode()} for rle in rles]


def segment_masks(sample: Sample) -> Tensor:
    """(N, H, W) bool: the pixels of each label, from `masks` or `segments`. Raises ValueError where it has neither."""
    if sample.segments is not None:
        rows = torch.arange(
            len(sample.labels), dtype=sample.segments.dtype, device=sample.segments.device
        )
        return sample.segments == rows[:, None, None]
    if sample.masks is None:
        raise ValueError(f"image '{sample.image_id}' of {sample.dataset} has no masks")
    return sample.masks


def drop_unseen(segments: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Segments (H, W) of rows of `labels` (N,) without the rows that have no pixel; the others are renumbered."""
    seen = np.bincount(segments.numpy().ravel() + 1, minlength=len(labels) + 1)[1:] > 0
    if seen.all():
        return segments, labels
    row = np.append(np.cumsum(seen, dtype=np.int16) - 1, -1).astype(
        np.int16
    )  # the last is that of -1
    return torch.from_numpy(row[segments.numpy()]), labels[torch.from_numpy(seen)]


def area_of(rle: dict) -> int:
    """The number of pixels in a compressed RLE."""
    return int(hotcoco.mask.area(rle))


def crop_masks(masks: Tensor, boxes: Tensor, size: int, rows: Tensor | None = None) -> Tensor:
    """(N, H, W) bool -> (R, size, size) bool: what a head of that resolution should predict in boxes (R, 4) xyxy.

    rows: (R,) the mask of each box, without it R = N; saves a copy of the mask for every box that shares one

    Source: facebookresearch/detectron2:detectron2/structures/masks.py (BitMasks.crop_and_resize).
    """
    rows = torch.arange(len(masks), device=boxes.device) if rows is None else rows
    rois = torch.cat([rows[:, None].to(boxes), boxes], dim=1)  # (R, 5)
    return (
        roi_align(masks[:, None].to(boxes), rois, size, sampling_ratio=0, aligned=True)[:, 0] >= 0.5
    )


def paste_masks(
    probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """(N, s, s) in 0..1, one square mask per box (N, 4) xyxy -> (N, H, W) bool in the image, size = (H, W).

    Bilinear at the pixels' centres, false outside of the box. Each box is sampled alone and within its own window, so
    that nothing but the result is as large as the image.
    Source: facebookresearch/detectron2:detectron2/layers/mask_ops.py (paste_masks_in_image).
    """
    pasted = torch.zeros(len(boxes), *size, dtype=torch.bool, device=probabilities.device)
    limits = torch.tensor([size[1], size[0]] * 2)
    boxes = boxes.detach().float().nan_to_num(0)
    windows = (
        torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], dim=1)
        .cpu()
        .clamp(min=0)
        .minimum(limits)
        .int()
    )
    for mask, probability, box, (x1, y1, x2, y2) in zip(
        pasted, probabilities.float(), boxes, windows.tolist()
    ):
        if x1 < x2 and y1 < y2:
            extent = (box[2:] - box[:2]).clamp(min=1e-6)
            x, y = (
                (torch.arange(start, end, device=box.device) + 0.5 - box[side]) / extent[side] * 2
                - 1
                for side, (start, end) in enumerate(((x1, x2), (y1, y2)))
            )
            points = torch.stack(
                torch.meshgrid(x, y, indexing="xy"), dim=-1
            )  # (h, w, 2), -1..1 in the box
            values = F.grid_sample(probability[None, None], points[None], align_corners=False)
            mask[y1:y2, x1:x2] = values[0, 0] >= threshold
    return pasted  # (N, H, W)


def paste_rles(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict]:
    """`paste_masks` straight to N COCO RLEs: never more than one mask of the image's size at a time."""
    return [
        encode_masks(paste_masks(p[None], box[None], size))[0]
        for p, box in zip(probabilities, boxes)
    ]
