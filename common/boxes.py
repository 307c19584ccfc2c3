"""Boxes as in detectron2: deltas and their loss, RoI pooling, NMS, IoU of pairs."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert, box_iou

from common.compiling import compilable
from common.roi_align import roi_align

MAX_LOG_SCALE = math.log(1000 / 16)  # largest dw or dh: a side grows at most 62.5 times


def sides(boxes: Tensor) -> Tensor:
    """Returns the widths and heights (N, 2) of boxes (N, 4)."""
    low, high = boxes.chunk(2, 1)
    return high - low


def centres(boxes: Tensor) -> Tensor:
    """Returns the centres (N, 2) of boxes (N, 4)."""
    low, high = boxes.chunk(2, 1)
    return (low + high) / 2


def have_area(boxes: Tensor) -> Tensor:
    """Returns which boxes (N, 4) have a positive width and height: (N,) bool."""
    low, high = boxes.chunk(2, 1)
    return (high > low).all(1)


def to_cxcywh(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns boxes (N, 4), in pixels of an image of (height, width), as boxes_cxcywh.

    These are the centre, the width and the height in 0..1 of the image.
    """
    height, width = size
    columns = box_convert(boxes, "xyxy", "cxcywh").unbind(-1)
    return torch.stack([x / s for x, s in zip(columns, (width, height) * 2)], -1)


def to_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns boxes_cxcywh (N, 4) in pixels of an image of (height, width), which are not clipped.

    It is the inverse of `to_cxcywh`.
    """
    height, width = size
    columns = box_convert(boxes, "cxcywh", "xyxy").unbind(-1)
    return torch.stack([x * s for x, s in zip(columns, (width, height) * 2)], -1)


def encode_boxes(boxes: Tensor, targets: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Returns the weighted deltas dx, dy, dw, dh (N, 4) that move boxes (N, 4) to targets (N, 4).

    weights: four factors by which dx, dy, dw, dh are multiplied
    Source: facebookresearch/detectron2:detectron2/modeling/box_regression.py (Box2BoxTransform).
    """
    centre, size = _centres_and_sides(boxes)
    target_centre, target_size = _centres_and_sides(targets)
    moved = target_centre - centre
    shift = moved / size
    ratio = target_size / size
    scale = torch.log(ratio)
    deltas = torch.cat([shift, scale], 1)  # (N, 4)
    columns = [delta * weight for delta, weight in zip(deltas.unbind(1), weights)]
    return torch.stack(columns, 1)


def _centres_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns centres and sides, (N, 2) each, with the same rounding errors as detectron2."""
    low, high = boxes.chunk(2, 1)
    size = high - low
    centre = low + 0.5 * size
    return centre, size


def decode_boxes(boxes: Tensor, deltas: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Moves boxes (N, 4) by weighted deltas (N, 4): the inverse of `encode_boxes`.

    A side grows at most by the factor 1000 / 16. Returns boxes (N, 4), which are not clipped.
    """
    centre, size = _centres_and_sides(boxes)
    columns = [delta / weight for delta, weight in zip(deltas.unbind(1), weights)]
    deltas = torch.stack(columns, 1)
    shift, log_scale = deltas.chunk(2, 1)
    centre = centre + shift * size
    log_scale = log_scale.clamp(max=MAX_LOG_SCALE)
    size = size * log_scale.exp()
    half = 0.5 * size
    low = centre - half
    high = centre + half
    return torch.cat([low, high], 1)  # (N, 4)


@compilable
def box_delta_loss(
    deltas: Tensor, labels: Tensor, boxes: Tensor, gt_boxes: Tensor, weights: tuple[float, ...]
) -> Tensor:
    """Class-agnostic box regression loss: 1/R sum_{r in fg} |d_r - encode(b_r, g_r)|_1.

    R is the number of regions, background included. If R is 0, the loss is 0.
    deltas:   (R, 4), d
    labels:   (R,), -1 on background; all other regions are foreground (fg)
    boxes:    (R, 4), b; gt_boxes: (R, 4), g, the matched ground truth, not read on background
    weights:  of encode, which is `encode_boxes`
    Source: facebookresearch/detectron2:detectron2/modeling/roi_heads/fast_rcnn.py (box_reg_loss).
    """
    bg = (labels < 0)[:, None]
    target = encode_boxes(boxes, gt_boxes, weights)  # (R, 4)
    error = (deltas - target).masked_fill(bg, 0)
    distance = error.abs()
    total = distance.sum()
    count = max(len(labels), 1)
    return total / count


def pool_rois(
    features: list[Tensor], strides: list[int], boxes: list[Tensor], resolution: int
) -> Tensor:
    """Pools each box by RoIAlign from the level that fits its size.

    A box of 224 x 224 pixels is pooled from the map of stride 16, a box twice as large from the
    next. Returns (R, F, r, r) in the order of the boxes; r is `resolution`.
    features: L tensors (B, F, h, w); strides: L numbers, each twice the one before
    boxes:    B tensors (Q, 4), R boxes in all
    Source: facebookresearch/detectron2:detectron2/modeling/poolers.py.
    """
    flat = torch.cat(boxes)  # (R, 4)
    image = [b.new_full((len(b),), i, dtype=torch.long) for i, b in enumerate(boxes)]
    image = torch.cat(image)  # (R,)
    area = sides(flat).prod(1)
    area = area.clamp(min=0)
    size = area.sqrt()
    ratio = size / 224 + 1e-8
    log_ratio = torch.log2(ratio)
    log_stride = torch.floor(4 + log_ratio)
    first = math.log2(strides[0])
    last = len(features) - 1
    level = log_stride - first
    level = level.nan_to_num(0).clamp(0, last)
    level = level.long()  # (R,)
    return roi_align(features, strides, flat, image, level, resolution)


def two_layers(
    channels: int, fc_dim: int, init: Callable[[Tensor], object] = nn.init.xavier_uniform_
) -> nn.Sequential:
    """Returns a box head of two linear layers with ReLU: (R, channels, 7, 7) -> (R, fc_dim).

    `init` fills the weight tensor of each layer in place. The biases are 0.
    """
    first = nn.Linear(channels * 49, fc_dim)
    second = nn.Linear(fc_dim, fc_dim)
    for layer in (first, second):
        init(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU())


def select_detections(
    boxes: Tensor, scores: Tensor, one_class: bool, threshold: float = 0.02, limit: int = 300
) -> tuple[Tensor, Tensor, Tensor]:
    """Selects the best detections of an image by NMS per class at IoU 0.5.

    Returns boxes (N, 4), scores (N,) and labels (N,), by falling score.
    boxes:     (Q, 4); scores: (Q, C)
    one_class: a box keeps only its best class, instead of every class
    threshold: only scores above it become detections
    limit:     largest N
    Source: facebookresearch/detectron2:detectron2/modeling/roi_heads/fast_rcnn.py
    (fast_rcnn_inference).
    """
    if one_class:
        highest = scores.amax(1, keepdim=True)
        scores = scores.masked_fill(scores < highest, 0)
    passing = scores > threshold
    row, label = passing.nonzero(as_tuple=True)
    score = scores[row, label]
    if len(row) > 10_000:  # only with tens of thousands of classes; NMS hardly ever needs the rest
        score, best = score.topk(10_000)
        row = row[best]
        label = label[best]
    box = boxes[row]
    kept = batched_nms(box, score, label, 0.5)
    kept = kept[:limit]
    return box[kept], score[kept], label[kept]


def soft_nms(boxes: Tensor, scores: Tensor, sigma: float = 0.5, min_score: float = 1e-3) -> Tensor:
    """Lowers scores by Gaussian soft-NMS per class: boxes (Q, 4), scores (Q, C) -> (Q, C), a copy.

    Repeatedly, the best remaining box of a class keeps its score, and the scores of the others are
    multiplied by exp(-IoU^2 / sigma). Each of at most Q rounds does this for all classes at once.
    A score that falls below `min_score` becomes 0.
    Source: arXiv 1704.04503, and mmcv's soft_nms.
    """
    iou = box_iou(boxes, boxes).nan_to_num(0)  # (Q, Q); that of two empty boxes is 0 / 0
    squared = iou**2
    exponent = -squared / sigma
    decay = torch.exp(exponent)
    remaining = scores.T.clone()  # (C, Q)
    final = torch.zeros_like(remaining)  # (C, Q)
    for _ in range(len(boxes)):
        best, row = remaining.max(1, keepdim=True)  # (C, 1)
        passing = best >= min_score
        if not passing.any():
            break
        best = best.masked_fill(best < min_score, 0)
        # the maximum: a class without remaining boxes must not lose a score
        final.scatter_reduce_(1, row, best, "amax")
        factor = decay[row.squeeze(1)]  # (C, Q)
        remaining = remaining * factor
        remaining.scatter_(1, row, 0)
    return final.T


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Returns the IoU of the boxes in the same row: (N, 4), (N, 4) -> (N,), 0 if one is empty."""
    low, high = boxes.chunk(2, 1)
    other_low, other_high = others.chunk(2, 1)
    low = torch.maximum(low, other_low)
    high = torch.minimum(high, other_high)
    overlap = high - low
    shared = overlap.clamp(min=0).prod(1)
    area = sides(boxes).prod(1)
    other_area = sides(others).prod(1)
    union = area + other_area - shared
    return shared / union.clamp(min=1e-6)
