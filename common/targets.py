"""Ground truth of images, and its assignment to anchors and regions by IoU."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from common.masks import have_pixels
from common.segment_map import SegmentMap

PAIRS = 2**24  # ground truth and box, of which the IoU is computed at once: 64 MiB


@dataclass
class Targets:
    """The ground truth of one image, with labels of the joint label space.

    boxes:        (N, 4) xyxy in pixels
    labels:       (N,) int64
    scope:        the columns of the classes that the image's dataset annotates, a slice or (C,)
                  bool; None: all
    masks:        (N, H, W) bool; one without a pixel says that the object has only a box. Or None.
                  Segmenters have a SegmentMap here, or the masks of the first objects alone, see
                  `sort_by_mask`
    image_labels: (K,) int64 image-level labels, or None; an image that has them has no boxes
    caption:      of an image with image-level labels; "" without one
    """

    boxes: Tensor
    labels: Tensor
    scope: slice | Tensor | None = None
    masks: Tensor | SegmentMap | None = None
    image_labels: Tensor | None = None
    caption: str = ""

    @property
    def has_mask(self) -> Tensor:
        """(N,) bool: the objects with a mask. Of the others only the box is known."""
        if self.masks is None:
            return torch.zeros_like(self.labels, dtype=torch.bool)
        return have_pixels(self.masks)

    @property
    def num_masked(self) -> int:
        """The number of `masks`."""
        return 0 if self.masks is None else len(self.masks)


@dataclass
class RegionTargets:
    """The targets of the Q sampled regions of one image.

    The matched ground truth is the best-overlapping one, even on background.
    boxes:    (Q, 4) xyxy, the matched ground truth; the regions themselves if there is none
    labels:   (Q,) int64, of the matched ground truth; -1 on background
    gt_index: (Q,) int64, row of the matched ground truth in `Targets`; 0 if there is none
    """

    boxes: Tensor
    labels: Tensor
    gt_index: Tensor


def match_by_iou(boxes: Tensor, gt_boxes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Returns the best-overlapping ground truth of each box, and whether its IoU >= threshold.

    boxes (Q, 4), gt_boxes (N, 4) -> index (Q,) int64, matched (Q,) bool
    Without ground truth, every index is 0 and nothing is matched.
    Source: facebookresearch/detectron2:detectron2/modeling/matcher.py, without low-quality matches.
    """
    if len(gt_boxes) == 0:
        index = boxes.new_zeros(len(boxes), dtype=torch.long)
        return index, index.bool()
    best = [iou.max(0) for iou in _ious(gt_boxes, boxes)()]
    values, indices = zip(*best)
    index = torch.cat(indices)  # (Q,)
    return index, torch.cat(values) >= threshold


def _ious(gt_boxes: Tensor, boxes: Tensor) -> Callable[[], Iterable[Tensor]]:
    """Returns a function that yields the IoU (N, q) of gt_boxes (N, 4) and parts of boxes (Q, 4).

    Thousands of boxes in one image would need gigabytes at once. A single part is computed once,
    several are computed anew at each call.
    """
    size = max(1, PAIRS // len(gt_boxes))
    parts = boxes.split(size)
    if len(parts) == 1:
        whole = [box_iou(gt_boxes, boxes)]
        return lambda: whole
    return lambda: (box_iou(gt_boxes, part) for part in parts)


def true_rows(flags: list[Tensor]) -> list[Tensor]:
    """Returns the rows where each of B tensors (Q,) bool is true, with one wait for the device."""
    counts = torch.stack([flag.sum() for flag in flags]).tolist()
    orders = [flag.argsort(descending=True, stable=True) for flag in flags]
    return [order[:count] for order, count in zip(orders, counts)]


def sort_by_mask(targets: list[Targets]) -> None:
    """Sorts the objects of each image in place: those with a mask first, and `masks` is of these.

    masks: (N, H, W) bool, without a pixel in the others. There is one wait for the device.
    """
    flags = [have_pixels(t.masks) for t in targets]
    for t, flag, masked in zip(targets, flags, true_rows(flags)):
        order = flag.argsort(descending=True, stable=True)  # it begins with `masked`
        t.boxes, t.labels, t.masks = t.boxes[order], t.labels[order], t.masks[masked]


def sample_fg_bg(matched: list[Tensor], num: int, fg_fraction: float) -> list[Tensor]:
    """Samples at most `num` rows of each of B tensors (Q,) bool; returns their indices, B tensors.

    At most `fg_fraction` of `num` are matched rows. They come first. There is one wait for the
    device.
    Source: facebookresearch/detectron2:detectron2/modeling/sampling.py.
    """
    counts = torch.stack([flag.sum() for flag in matched]).tolist()
    sampled = []
    for flag, count in zip(matched, counts):
        shuffled = torch.randperm(len(flag), device=flag.device)
        first_matched = flag[shuffled].argsort(descending=True, stable=True)
        order = shuffled[first_matched]
        num_fg = min(count, int(num * fg_fraction))
        num_bg = min(len(flag) - count, num - num_fg)
        sampled.append(torch.cat([order[:num_fg], order[count : count + num_bg]]))
    return sampled


def wholly_inside(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns the indices of the anchors (A, 4) that lie wholly in an image of (height, width)."""
    height, width = size
    left, top, right, bottom = anchors.unbind(1)
    inside = (left >= 0) & (top >= 0)
    inside &= (right < width) & (bottom < height)
    return inside.nonzero().squeeze(1)


def sample_anchors(matched: Tensor, num: int, fg_fraction: float) -> Tensor:
    """Samples anchors as `sample_fg_bg`, none of those that are neither; returns their indices.

    matched: (A,) of `match_anchors`
    """
    decided = (matched > -2).nonzero().squeeze(1)
    (sampled,) = sample_fg_bg([matched[decided] >= 0], num, fg_fraction)
    return decided[sampled]


def match_anchors(
    anchors: Tensor, gt_boxes: Tensor, fg_iou: float, bg_iou: float, low_iou: float
) -> Tensor:
    """Returns the row of the ground truth of each anchor: (M,), -1 on background, -2 for neither.

    An anchor is foreground if its best IoU is at least fg_iou, and background if it is below
    bg_iou. Low-quality matches: a ground truth whose best IoU with any anchor is at least low_iou
    also takes all anchors of this IoU, even from another ground truth; of several, the last one
    gets the anchor. anchors (M, 4), gt_boxes (N, 4)
    Source: mmdetection:mmdet/core/bbox/assigners/max_iou_assigner.py.
    """
    if len(gt_boxes) == 0:
        return anchors.new_full((len(anchors),), -1, dtype=torch.long)
    ious = _ious(gt_boxes, anchors)
    top = anchors.new_zeros(len(gt_boxes), 1)
    for iou in ious():
        top = top.maximum(iou.amax(1, keepdim=True))  # (N, 1)
    matched = []
    for iou in ious():  # (N, m)
        best, index = iou.max(0)  # (m,)
        unmatched = torch.where(best < bg_iou, -1, -2)
        rows = torch.where(best >= fg_iou, index, unmatched)
        takes = (iou == top) & (top >= low_iou)  # (N, m)
        number = torch.arange(1, len(iou) + 1, device=iou.device)[:, None]
        taker = (takes * number).amax(0)  # (m,) row + 1 of the last one that takes it; 0: none
        matched.append(torch.where(taker > 0, taker - 1, rows))
    return torch.cat(matched)


def match_regions(
    boxes: list[Tensor], targets: list[Targets], iou: float, num_samples: int = 0
) -> tuple[list[Tensor], list[RegionTargets]]:
    """Matches the regions of each image, B tensors (Q, 4), to its ground truth.

    Returns regions and targets, B of each. A region is background if its best IoU is below `iou`.
    With num_samples > 0 (first stage), the ground truth's boxes join the regions. Then num_samples
    regions of an image are sampled, at most a quarter of them foreground.
    Source: facebookresearch/detectron2:detectron2/modeling/roi_heads (roi_heads.py,
    cascade_rcnn.py).
    """
    if num_samples:
        boxes = [torch.cat([t.boxes, b]) for t, b in zip(targets, boxes)]
    found = [match_by_iou(b, t.boxes, iou) for t, b in zip(targets, boxes)]
    if num_samples:
        rows = sample_fg_bg([matched for _, matched in found], num_samples, 0.25)
        boxes = [b[row] for b, row in zip(boxes, rows)]
        found = [(index[row], matched[row]) for (index, matched), row in zip(found, rows)]
    return boxes, [_targets_of(b, t, *of) for b, t, of in zip(boxes, targets, found)]


def _targets_of(
    boxes: Tensor, targets: Targets, gt_index: Tensor, matched: Tensor
) -> RegionTargets:
    """Returns the targets of regions (Q, 4) with the `match_by_iou` index and matched (Q,)."""
    if len(targets.boxes) == 0:
        return RegionTargets(boxes, torch.full_like(gt_index, -1), gt_index)
    labels = targets.labels[gt_index].masked_fill(~matched, -1)
    return RegionTargets(targets.boxes[gt_index], labels, gt_index)
