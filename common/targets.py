"""Which ground truth supervises which prediction."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.ops import box_iou


@dataclass
class Targets:
    """What is known of an image, or of its regions, in the joint label space.

    boxes:        (N, 4) xyxy in pixels
    labels:       (N,), for regions -1 on background
    scope:        start and stop of the labels of the image's own dataset, where labels are concatenated
    masks:        (N, H, W) bool of the image's ground truth, or None; regions have it as it is
    owner:        (N,), only for regions: the row of their ground truth, whatever the overlap
    image_labels: (K,), or None; an image that has them has no boxes, but may have a caption
    """

    boxes: Tensor
    labels: Tensor
    scope: tuple[int, int] = (0, 0)
    masks: Tensor | None = None
    owner: Tensor | None = None
    image_labels: Tensor | None = None
    caption: str = ""


def match_by_iou(boxes: Tensor, gt_boxes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """(Q, 4) boxes, (N, 4) ground truth -> (Q,) index of the best ground truth, (Q,) bool IoU >= threshold.

    Without ground truth every index is 0 and nothing is matched.
    Source: facebookresearch/detectron2:detectron2/modeling/matcher.py, without low-quality matches.
    """
    if len(gt_boxes) == 0:
        return boxes.new_zeros(len(boxes), dtype=torch.long), boxes.new_zeros(
            len(boxes), dtype=torch.bool
        )
    iou, index = box_iou(gt_boxes, boxes).max(dim=0)  # (Q,)
    return index, iou >= threshold


def sample_fg_bg(matched: Tensor, num: int, fg_fraction: float) -> Tensor:
    """(Q,) bool -> indices of at most `num` rows, at most `fg_fraction` of them matched; foreground first.

    Source: facebookresearch/detectron2:detectron2/modeling/sampling.py.
    """
    fg, bg = matched.nonzero().squeeze(1), (~matched).nonzero().squeeze(1)
    num_fg = min(len(fg), int(num * fg_fraction))
    num_bg = min(len(bg), num - num_fg)
    fg = fg[torch.randperm(len(fg), device=fg.device)[:num_fg]]
    return torch.cat([fg, bg[torch.randperm(len(bg), device=bg.device)[:num_bg]]])


def match_anchors(
    anchors: Tensor, gt_boxes: Tensor, fg_iou: float, bg_iou: float, low_iou: float
) -> Tensor:
    """(M, 4) anchors, (N, 4) ground truth -> (M,) index of the ground truth, -1: background, -2: neither.

    Foreground overlaps its best ground truth by fg_iou, background none by bg_iou. A ground truth whose best overlap
    is low_iou or more also takes the anchors that reach it, from whomever had them; of several the last one wins.
    Source: mmdetection:mmdet/core/bbox/assigners/max_iou_assigner.py.
    """
    if len(gt_boxes) == 0:
        return anchors.new_full((len(anchors),), -1, dtype=torch.long)
    iou = box_iou(gt_boxes, anchors)  # (N, M)
    best, index = iou.max(0)  # (M,)
    matched = torch.where(best >= fg_iou, index, torch.where(best < bg_iou, -1, -2))
    top = iou.amax(1, keepdim=True)  # (N, 1)
    number = torch.arange(1, len(iou) + 1, device=iou.device)[:, None]
    taken = (((iou == top) & (top >= low_iou)) * number).amax(0)  # (M,) 0: by none
    return torch.where(taken > 0, taken - 1, matched)


def match_regions(boxes: Tensor, truth: Targets, iou: float, sample: int) -> tuple[Tensor, Targets]:
    """Regions (Q, 4) of one image and what supervises them; the label is -1 where no ground truth overlaps by `iou`.

    sample > 0 (first stage): the ground truth joins the proposals and `sample` regions are drawn, a quarter foreground.
    Source: facebookresearch/detectron2:detectron2/modeling/roi_heads (roi_heads.py, cascade_rcnn.py).
    """
    if sample:
        boxes = torch.cat([truth.boxes, boxes])
    index, matched = match_by_iou(boxes, truth.boxes, iou)
    if sample:
        drawn = sample_fg_bg(matched, sample, 0.25)
        boxes, index, matched = boxes[drawn], index[drawn], matched[drawn]
    if len(truth.boxes) == 0:
        labels = boxes.new_full((len(boxes),), -1, dtype=torch.long)
        return boxes, replace(truth, boxes=boxes, labels=labels, masks=None)
    labels = truth.labels[index].masked_fill(~matched, -1)
    return boxes, replace(truth, boxes=truth.boxes[index], labels=labels, owner=index)
