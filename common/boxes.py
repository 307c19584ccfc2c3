"""Boxes as in detectron2: deltas and their loss, RoI pooling, NMS, IoU of pairs."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou, roi_align

MAX_LOG_SCALE = math.log(1000 / 16)  # a delta may enlarge a box at most this much


def sides(boxes: Tensor) -> Tensor:
    """Returns the widths and heights (N, 2) of boxes (N, 4)."""
    return boxes[:, 2:] - boxes[:, :2]


def centres(boxes: Tensor) -> Tensor:
    """Returns the centres (N, 2) of boxes (N, 4)."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def have_area(boxes: Tensor) -> Tensor:
    """Returns which boxes (N, 4) are not empty: (N,) bool."""
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


def encode_boxes(boxes: Tensor, targets: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Returns the weighted deltas dx, dy, dw, dh (N, 4) that move boxes (N, 4) to targets (N, 4).

    Source: facebookresearch/detectron2:detectron2/modeling/box_regression.py (Box2BoxTransform).
    """
    size = sides(boxes)
    target_size = sides(targets)
    centre = boxes[:, :2] + 0.5 * size
    target_centre = targets[:, :2] + 0.5 * target_size
    shift = (target_centre - centre) / size
    scale = torch.log(target_size / size)
    deltas = torch.cat([shift, scale], 1)  # (N, 4)
    return deltas * deltas.new_tensor(weights)


def decode_boxes(boxes: Tensor, deltas: Tensor, weights: tuple[float, ...]) -> Tensor:
    """Moves boxes (N, 4) by weighted deltas (N, 4): the inverse of `encode_boxes`."""
    size = sides(boxes)
    centre = boxes[:, :2] + 0.5 * size
    deltas = deltas / deltas.new_tensor(weights)
    centre = centre + deltas[:, :2] * size
    size = size * deltas[:, 2:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], 1)  # (N, 4)


def box_delta_loss(
    deltas: Tensor, labels: Tensor, boxes: Tensor, gt_boxes: Tensor, weights: tuple[float, ...]
) -> Tensor:
    """Class-agnostic box regression loss: 1/R sum_{r in fg} |d_r - encode(b_r, g_r)|_1.

    R counts all regions, background too. Without any, the loss is 0.
    deltas d (R, 4), labels (R,), -1 on background, boxes b (R, 4), gt_boxes g (R, 4)
    Source: facebookresearch/detectron2:detectron2/modeling/roi_heads/fast_rcnn.py (box_reg_loss).
    """
    fg = labels >= 0
    target = encode_boxes(boxes[fg], gt_boxes[fg], weights)  # (R_fg, 4)
    return (deltas[fg] - target).abs().sum() / max(len(labels), 1)


class RoIAlign(torch.autograd.Function):
    """torchvision's roi_align, whose backward pass visits only the regions that have a gradient.

    Of an image with image-level labels, that is one region in a hundred.
    """

    @staticmethod
    def forward(ctx, feature: Tensor, rois: Tensor, resolution: int, scale: float) -> Tensor:
        """feature (B, F, h, w), rois (R, 5) = image index and box -> (R, F, r, r)."""
        ctx.save_for_backward(rois)
        ctx.settings = (scale, resolution, resolution, *feature.shape)
        return roi_align(feature, rois, resolution, scale, aligned=True)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """Gradient (R, F, r, r) of the output -> gradient (B, F, h, w) of the feature."""
        (rois,) = ctx.saved_tensors
        rows = gradient.flatten(1).any(1)  # (R,)
        backward = torch.ops.torchvision._roi_align_backward
        gradient = backward(gradient[rows], rois[rows], *ctx.settings, 0, True)
        return gradient, None, None, None


def pool_rois(
    features: list[Tensor], strides: list[int], boxes: list[Tensor], resolution: int
) -> Tensor:
    """Pools each box by RoIAlign from the level that fits its size: (R, F, r, r).

    A box of 224 x 224 pixels is pooled from the map of stride 16.
    features: L tensors (B, F, h, w), with their strides; boxes: B tensors (Q, 4), R in all
    Source: facebookresearch/detectron2:detectron2/modeling/poolers.py.
    """
    flat = torch.cat(boxes)  # (R, 4)
    counts = torch.tensor([len(b) for b in boxes], device=flat.device)
    image = torch.repeat_interleave(counts)  # (R,)
    rois = torch.cat([image[:, None].to(flat), flat], 1)  # (R, 5)
    size = sides(flat).prod(1).clamp(min=0).sqrt()
    log_stride = torch.floor(4 + torch.log2(size / 224 + 1e-8))
    level = log_stride - math.log2(strides[0])
    level = level.clamp(0, len(features) - 1).long()  # (R,)
    pooled, rows = [], []
    for i, (feature, stride) in enumerate(zip(features, strides)):
        row = (level == i).nonzero().squeeze(1)
        rows.append(row)
        pooled.append(RoIAlign.apply(feature, rois[row], resolution, 1 / stride))
    order = torch.cat(rows).argsort()
    return torch.cat(pooled)[order]  # in the order of the boxes


def two_layers(
    channels: int, fc_dim: int, init: Callable[[Tensor], object] = nn.init.xavier_uniform_
) -> nn.Sequential:
    """Returns a box head: pooled features (R, F, 7, 7) -> (R, fc_dim); `init` fills its weights."""
    layers = nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * 49, fc_dim),
        nn.ReLU(),
        nn.Linear(fc_dim, fc_dim),
        nn.ReLU(),
    )
    for layer in (layers[1], layers[3]):
        init(layer.weight)
        nn.init.zeros_(layer.bias)
    return layers


def select_detections(
    boxes: Tensor, scores: Tensor, one_class: bool, threshold: float = 0.02, limit: int = 300
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the best `limit` detections of an image after NMS per class at IoU 0.5.

    boxes (Q, 4), scores (Q, C) -> boxes (N, 4), scores (N,), labels (N,)
    one_class: a box keeps only its best class, instead of every class above the threshold
    Source: facebookresearch/detectron2:detectron2/modeling/roi_heads/fast_rcnn.py
    (fast_rcnn_inference).
    """
    if one_class:
        scores = scores.masked_fill(scores < scores.amax(1, keepdim=True), 0)
    row, label = (scores > threshold).nonzero(as_tuple=True)
    if len(row) > 10_000:  # with tens of thousands of classes; NMS hardly ever needs more
        best = scores[row, label].topk(10_000).indices
        row = row[best]
        label = label[best]
    kept = batched_nms(boxes[row], scores[row, label], label, 0.5)[:limit]
    row = row[kept]
    label = label[kept]
    return boxes[row], scores[row, label], label


def soft_nms(boxes: Tensor, scores: Tensor, sigma: float = 0.5, min_score: float = 1e-3) -> Tensor:
    """Gaussian soft-NMS per class: boxes (Q, 4), scores (Q, C) -> (Q, C), 0 if below `min_score`.

    Repeatedly, the best remaining box of a class keeps its score, and the scores of the others are
    multiplied by exp(-IoU^2 / sigma). Each of at most Q rounds does this for all classes at once.
    Source: arXiv 1704.04503, and mmcv's soft_nms.
    """
    decay = torch.exp(-(box_iou(boxes, boxes) ** 2) / sigma)  # (Q, Q)
    remaining = scores.T.clone()  # (C, Q)
    final = torch.zeros_like(remaining)  # (C, Q)
    for _ in range(len(boxes)):
        best, row = remaining.max(1)  # (C,)
        if not (best >= min_score).any():
            break
        best = best.masked_fill(best < min_score, 0)
        column = row[:, None]  # (C, 1)
        # the maximum: a class without remaining boxes must not lose a score
        final.scatter_reduce_(1, column, best[:, None], "amax")
        remaining = (remaining * decay[row]).scatter_(1, column, 0)
    return final.T


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes in the same row: (N, 4), (N, 4) -> (N,). Empty boxes overlap nothing."""
    low = torch.maximum(boxes[:, :2], others[:, :2])
    high = torch.minimum(boxes[:, 2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    area = sides(boxes).prod(1) + sides(others).prod(1)
    return shared / (area - shared).clamp(min=1e-6)
