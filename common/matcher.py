"""Which ground truth supervises which prediction."""

import torch
from torch import Tensor
from torchvision.ops import box_iou


def match_by_iou(boxes: Tensor, gt_boxes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """(Q, 4) boxes, (N, 4) ground truth -> (Q,) index of the best ground truth, (Q,) bool IoU >= threshold.

    Without ground truth every index is 0 and nothing is matched.
    Source: facebookresearch/detectron2:detectron2/modeling/matcher.py, without low-quality matches.
    """
    if len(gt_boxes) == 0:
        return boxes.new_zeros(len(boxes), dtype=torch.long), boxes.new_zeros(len(boxes), dtype=torch.bool)
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
