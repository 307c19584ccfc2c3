"""Matching of predicted boxes to objects one to one, and its losses: focal, L1 and GIoU.

Boxes have the suffix _cxcywh: centre, width and height in 0..1 of the image without its padding.

Source: fundamentalvision/Deformable-DETR:models/{matcher.py,deformable_detr.py}.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou

from common.boxes import sides, to_cxcywh
from common.point_matching import assign
from common.targets import Targets

# Shapes: B images, Z predictions (decoder layers), Q queries, C classes, N objects of an image,
# R matched pairs of all images and predictions.

ALPHA = 0.25  # of the focal loss: weight of positives; that of negatives is 1 - ALPHA
CLASS, L1, GIOU = 2.0, 5.0, 2.0  # weights of cost and losses; Plain-Det's class losses have 1


def focal_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns how much focal loss a positive of each label adds: (Z, Q, C), (N,) -> (Z, Q, N)."""
    p = logits[..., labels].sigmoid()
    positive = -ALPHA * (1 - p) ** 2 * (p + 1e-8).log()
    negative = -(1 - ALPHA) * p**2 * (1 - p + 1e-8).log()
    return positive - negative


def match_cost(logits: Tensor, boxes: Tensor, labels: Tensor, gt_boxes: Tensor) -> Tensor:
    """Returns the cost of each query and object of an image: (Z, Q, N).

    It is 2 `focal_cost` + 5 |b - g|_1 - 2 GIoU(b, g).
    logits: (Z, Q, C); boxes: (Z, Q, 4); labels: (N,); gt_boxes: (N, 4); boxes are boxes_cxcywh
    """
    flat = boxes.flatten(0, 1)  # (Z Q, 4)
    corners = [box_convert(b, "cxcywh", "xyxy") for b in (flat, gt_boxes)]
    distance = torch.cdist(flat, gt_boxes, p=1)
    giou = generalized_box_iou(*corners)
    of_boxes = L1 * distance - GIOU * giou  # (Z Q, N)
    of_class = CLASS * focal_cost(logits, labels)
    return of_class + of_boxes.view_as(of_class)


class Matches(NamedTuple):
    """The R matched pairs of all images and predictions, sorted by image, then by object."""

    z: Tensor  # (R,) row of the prediction
    image: Tensor  # (R,)
    query: Tensor  # (R,)
    labels: Tensor  # (R,) of the object
    boxes: Tensor  # (R, 4) boxes_cxcywh of the object

    def classes(self, shape: torch.Size, background: int) -> Tensor:
        """Returns the label of each query, `background` without an object. shape: (Z, B, Q)"""
        classes = self.labels.new_full(shape, background)
        return classes.index_put((self.z, self.image, self.query), self.labels)


@torch.no_grad()
def match(
    logits: Tensor, boxes: Tensor, targets: list[Targets], sizes: list[tuple[int, int]]
) -> Matches:
    """Matches the queries of each image and prediction to its objects by the Hungarian method.

    logits: (Z, B, Q, C), of the columns that targets.labels count; boxes: (Z, B, Q, 4) boxes_cxcywh
    sizes:  B pairs (height, width) before padding, for the targets' boxes
    There are two waits for the device: there and back.
    """
    objects = [to_cxcywh(t.boxes, size) for t, size in zip(targets, sizes)]
    logits, boxes = logits.float(), boxes.float()
    of_images = zip(logits.unbind(1), boxes.unbind(1), targets, objects)
    costs = [match_cost(x, b, t.labels, rows) for x, b, t, rows in of_images]
    return matched(costs, targets, objects)


def matched(costs: list[Tensor], targets: list[Targets], objects: list[Tensor]) -> Matches:
    """Returns the cheapest pairs of all images, by costs (Z, Q, N).

    objects: (N, 4) boxes_cxcywh of the targets of each image. There are two waits for the device.
    """
    parts = []
    for i, (pairs, t, rows) in enumerate(zip(assign(costs), targets, objects)):
        image = torch.full_like(pairs.query, i)
        labels = t.labels[pairs.target]
        parts.append((pairs.z, image, pairs.query, labels, rows[pairs.target]))
    return Matches(*(torch.cat(part) for part in zip(*parts)))


def loss_focal(
    logits: Tensor, target: Tensor, num_boxes: Tensor, weight: Tensor | None = None
) -> Tensor:
    """1/num_boxes sum w a_t (1 - p_t)^2 BCE(sigmoid(x), t), sum over all queries and classes.

    x is `logits`, t is `target` in {0, 1}, w is `weight`, all (Z, B, Q, C); without weight, w is 1.
    p_t is sigmoid(x) and a_t 0.25 where t = 1, else 1 - sigmoid(x) and 0.75.
    num_boxes: a scalar
    """
    bce = F.binary_cross_entropy_with_logits(logits, target, weight, reduction="none")
    p = logits.sigmoid()
    wrong = p + target * (1 - 2 * p)  # 1 - p_t
    share = (1 - ALPHA) + target * (2 * ALPHA - 1)
    return (share * wrong**2 * bce).sum() / num_boxes


def loss_l1(boxes: Tensor, gt_boxes: Tensor, num_boxes: Tensor) -> Tensor:
    """1/num_boxes |b_r - g_r|_1 of each of R pairs of boxes_cxcywh, (R, 4) each: (R,)."""
    return (boxes - gt_boxes).abs().sum(-1) / num_boxes


def paired_giou(boxes: Tensor, others: Tensor, eps: float = 1e-6) -> Tensor:
    """Returns the GIoU of the xyxy boxes in the same row: (R, 4), (R, 4) -> (R,).

    eps is added to both denominators, as in SooLab/Plain-Det:detrex/layers/box_ops.py: boxes of a
    pixel are as small. torchvision's form would wait for the device.
    """
    low, high = boxes.chunk(2, 1)
    other_low, other_high = others.chunk(2, 1)
    overlap = torch.minimum(high, other_high) - torch.maximum(low, other_low)
    shared = overlap.clamp(min=0).prod(1)
    union = sides(boxes).prod(1) + sides(others).prod(1) - shared
    extent = torch.maximum(high, other_high) - torch.minimum(low, other_low)
    hull = extent.prod(1)
    return shared / (union + eps) - (hull - union) / (hull + eps)


def loss_giou(boxes: Tensor, gt_boxes: Tensor, num_boxes: Tensor) -> Tensor:
    """1/num_boxes (1 - GIoU(b_r, g_r)) of each of R pairs of boxes_cxcywh, (R, 4) each: (R,)."""
    corners = [box_convert(b, "cxcywh", "xyxy") for b in (boxes, gt_boxes)]
    return (1 - paired_giou(*corners)) / num_boxes


def proposal_losses(
    scores: Tensor,
    boxes: Tensor,
    targets: list[Targets],
    sizes: list[tuple[int, int]],
    num_boxes: Tensor,
) -> dict[str, Tensor]:
    """Returns the weighted losses of the first stage, for which all objects are of one class.

    The focal loss has weight 1, as in Plain-Det.
    scores: (B, S, C), logits of all cells, whose first column is that of objects
    boxes:  (B, S, 4) boxes_cxcywh; sizes: as in `match`; num_boxes: a scalar
    """
    objects = [Targets(t.boxes, torch.zeros_like(t.labels)) for t in targets]
    scores, boxes = scores[None], boxes[None]  # (1, B, S, .)
    found = match(scores, boxes, objects, sizes)
    classes = found.classes(scores.shape[:-1], background=-1)  # (1, B, S)
    columns = torch.arange(scores.shape[-1], device=scores.device)
    truth = classes[..., None] == columns  # (1, B, S, C)
    near = boxes[found.z, found.image, found.query]  # (R, 4)
    return {
        "loss_class_enc": loss_focal(scores, truth.to(scores), num_boxes),
        "loss_bbox_enc": L1 * loss_l1(near, found.boxes, num_boxes).sum(),
        "loss_giou_enc": GIOU * loss_giou(near, found.boxes, num_boxes).sum(),
    }
