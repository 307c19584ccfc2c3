"""Box deltas and RoI pooling as in detectron2; IoU, NMS and clipping are torchvision's."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou, roi_align

MAX_LOG_SCALE = math.log(1000 / 16)  # a delta may enlarge a box at most this much


def _centre_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes[:, :2] + 0.5 * size, size


def encode_boxes(boxes: Tensor, targets: Tensor, weights: tuple[float, ...]) -> Tensor:
    """(N, 4) xyxy boxes and the (N, 4) boxes they should become -> (N, 4) weighted (dx, dy, dw, dh).

    Source: facebookresearch/detectron2:detectron2/modeling/box_regression.py (Box2BoxTransform).
    """
    centre, size = _centre_size(boxes)
    target_centre, target_size = _centre_size(targets)
    deltas = torch.cat(
        [(target_centre - centre) / size, torch.log(target_size / size)], dim=1
    )  # (N, 4)
    return deltas * deltas.new_tensor(weights)


def decode_boxes(boxes: Tensor, deltas: Tensor, weights: tuple[float, ...]) -> Tensor:
    """The inverse of `encode_boxes`: (N, 4) xyxy boxes moved by (N, 4) weighted deltas; growth is capped."""
    centre, size = _centre_size(boxes)
    deltas = deltas / deltas.new_tensor(weights)
    centre = centre + deltas[:, :2] * size
    size = size * deltas[:, 2:].clamp(max=MAX_LOG_SCALE).exp()
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], dim=1)  # (N, 4)


def box_delta_loss(
    deltas: Tensor, labels: Tensor, boxes: Tensor, gt_boxes: Tensor, weights: tuple[float, ...]
) -> Tensor:
    """L1 of the foreground's deltas, class-agnostic: sum over foreground / all R regions.

    deltas, boxes, gt_boxes (R, 4); labels (R,), -1 on background.
    Source: facebookresearch/detectron2:detectron2/modeling/roi_heads/fast_rcnn.py (box_reg_loss).
    """
    fg = labels >= 0
    wanted = encode_boxes(boxes[fg], gt_boxes[fg], weights)  # (R_fg, 4)
    return (deltas[fg] - wanted).abs().sum() / max(len(labels), 1)


class RoIAlign(torch.autograd.Function):
    """torchvision's roi_align, half-pixel aligned, whose backward visits only regions that have a gradient.

    Of the proposals of an image that has nothing but a label, that is one in a hundred.
    """

    @staticmethod
    def forward(ctx, feature: Tensor, rois: Tensor, resolution: int, scale: float) -> Tensor:
        """feature (B, F, h, w), rois (R, 5) of image and box -> (R, F, r, r)."""
        ctx.save_for_backward(rois)
        ctx.settings = scale, resolution, resolution, *feature.shape
        return roi_align(feature, rois, resolution, scale, aligned=True)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (rois,), rows = ctx.saved_tensors, gradient.flatten(1).any(1)  # (R,)
        backward = torch.ops.torchvision._roi_align_backward
        return backward(gradient[rows], rois[rows], *ctx.settings, 0, True), None, None, None


def pool_rois(
    features: list[Tensor], strides: list[int], boxes: list[Tensor], resolution: int
) -> Tensor:
    """RoIAlign of every box on the level that fits its size.

    features L times (B, F, h, w), boxes B times (Q, 4) -> (R, F, r, r), R the regions of all images.

    A 224-pixel box goes to the stride-16 level. Half-pixel aligned, adaptive sampling.
    Source: facebookresearch/detectron2:detectron2/modeling/poolers.py.
    """
    flat = torch.cat(boxes)  # (R, 4)
    image = torch.repeat_interleave(torch.tensor([len(b) for b in boxes], device=flat.device))
    rois = torch.cat([image[:, None].to(flat), flat], dim=1)  # (R, 5)
    size = (flat[:, 2:] - flat[:, :2]).prod(1).clamp(min=0).sqrt()
    level = torch.floor(4 + torch.log2(size / 224 + 1e-8)) - math.log2(strides[0])
    level = level.clamp(0, len(features) - 1).long()  # (R,)
    rows = [(level == i).nonzero().squeeze(1) for i in range(len(features))]
    pooled = [
        RoIAlign.apply(feature, rois[r], resolution, 1 / stride)
        for feature, stride, r in zip(features, strides, rows)
    ]
    return torch.cat(pooled)[torch.cat(rows).argsort()]  # back to the order of the boxes


def two_layers(
    channels: int, fc_dim: int, init: Callable[[Tensor], object] = nn.init.xavier_uniform_
) -> nn.Sequential:
    """Pooled features (R, F, 7, 7) -> (R, fc_dim); `init` fills the weights of both layers."""
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
):
    """boxes (Q, 4), scores (Q, C) -> the best `limit` (N, 4), (N,), labels (N,) after NMS per class at IoU 0.5.

    one_class: only the best class of each box, instead of every class above the threshold.
    Source: facebookresearch/detectron2:detectron2/modeling/roi_heads/fast_rcnn.py (fast_rcnn_inference).
    """
    if one_class:
        scores = scores.masked_fill(scores < scores.amax(1, keepdim=True), 0)
    row, label = (scores > threshold).nonzero(as_tuple=True)
    if len(row) > 10_000:  # tens of thousands of classes; NMS hardly ever looks so far down
        best = scores[row, label].topk(10_000).indices
        row, label = row[best], label[best]
    kept = batched_nms(boxes[row], scores[row, label], label, 0.5)[:limit]
    row, label = row[kept], label[kept]
    return boxes[row], scores[row, label], label


def soft_nms(boxes: Tensor, scores: Tensor, sigma: float = 0.5, min_score: float = 1e-3) -> Tensor:
    """Gaussian soft-NMS of every class: boxes (Q, 4), scores (Q, C) -> decayed scores (Q, C), 0 below min_score.

    Class by class the best remaining box k is kept and the others decay by exp(-IoU^2 / sigma). All classes share the
    boxes, so each of at most Q rounds handles every class at once. Source: arXiv 1704.04503, and mmcv's soft_nms.
    """
    decay = torch.exp(-(box_iou(boxes, boxes) ** 2) / sigma)  # (Q, Q)
    left, final = scores.T.clone(), torch.zeros_like(scores.T)  # (C, Q)
    for _ in range(len(boxes)):
        best, row = left.max(1)  # (C,)
        if not (best >= min_score).any():
            break
        best = best.masked_fill(best < min_score, 0)
        final.scatter_reduce_(
            1, row[:, None], best[:, None], "amax"
        )  # a class that has nothing left keeps its scores
        left = (left * decay[row]).scatter_(1, row[:, None], 0)
    return final.T


def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each box with the one in the same row: (N, 4), (N, 4) -> (N,). A box of negative size overlaps nothing."""
    low, high = (
        torch.maximum(boxes[:, :2], others[:, :2]),
        torch.minimum(boxes[:, 2:], others[:, 2:]),
    )
    shared = (high - low).clamp(min=0).prod(1)
    area, other_area = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, others))
    return shared / (area + other_area - shared).clamp(min=1e-6)
