"""OLN's region proposal network (arXiv 2108.06753): how well a box is centred on an object, and not whether it is one.

Source: zhenyuw16/UniDetector:mmdet/models/dense_heads/oln_rpn_head.py. M counts the anchors of all levels of an image,
one per cell; tblr are distances to top, bottom, left and right from an anchor's centre in sides of the anchor.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

from common.boxes import paired_iou
from common.matcher import match_anchors, sample_fg_bg

STRIDES = [4, 8, 16, 32, 64]


class RPN(nn.Module):
    """Head, targets, losses and proposals; parameter names are the official ones.

    Two assignments, each (IoU of foreground, of background, of low-quality matches), and shares of foreground.
    """

    scale = 8  # side of an anchor in strides
    box_match, box_fraction = (0.7, 0.3, 0.3), 0.5
    centre_match, centre_fraction = (0.3, 0.1, 0.3), 1.0
    sampled = 256  # anchors per image and assignment
    pre_nms = 2000  # proposals per level; there is no NMS

    def __init__(self, channels: int):
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_reg, self.rpn_obj = nn.Conv2d(channels, 4, 1), nn.Conv2d(channels, 1, 1)
        for conv in self.children():
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def head(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """L maps (B, F, h, w) -> of each: tblr (B, h * w, 4), objectness logits (B, h * w)."""
        hidden = [F.normalize(self.rpn_conv(f).relu()) for f in features]  # unit length over channels
        return (
            [self.rpn_reg(x).flatten(2).transpose(1, 2) for x in hidden],
            [self.rpn_obj(x).flatten(1) for x in hidden],
        )

    def anchors(self, features: list[Tensor]) -> list[Tensor]:
        """The square anchors (h * w, 4) of each level, row by row; the first is centred on the image's corner."""
        anchors = []
        for feature, stride in zip(features, STRIDES):
            y, x = (torch.arange(n, device=feature.device, dtype=torch.float) * stride for n in feature.shape[-2:])
            y, x = torch.meshgrid(y, x, indexing="ij")
            centre, half = torch.stack([x, y], -1).view(-1, 2), self.scale * stride / 2
            anchors.append(torch.cat([centre - half, centre + half], 1))
        return anchors

    def forward(self, features: list[Tensor], sizes: list[tuple[int, int]], gt_boxes: list[Tensor] | None = None):
        """Proposals per image [(boxes (Q, 4), scores (Q,))], level by level; losses if `gt_boxes` are given."""
        anchors = self.anchors(features)
        tblr, logits = self.head(features)
        losses = {}
        if gt_boxes is not None:
            losses = self.losses(torch.cat(anchors), torch.cat(tblr, 1), torch.cat(logits, 1), gt_boxes, sizes)
        with torch.no_grad():
            proposals = [
                self.proposals(anchors, [t[i] for t in tblr], [o[i].sigmoid() for o in logits], size)
                for i, size in enumerate(sizes)
            ]
        return proposals, losses

    def proposals(self, anchors: list[Tensor], tblr: list[Tensor], scores: list[Tensor], size: tuple[int, int]):
        """The best boxes (Q, 4) of one image, level by level, clipped to it, and their scores (Q,)."""
        boxes, kept = [], []
        for anchor, distance, score in zip(anchors, tblr, scores):
            score, row = score.topk(min(len(score), self.pre_nms))
            boxes.append(clip_boxes_to_image(decode_tblr(anchor[row], distance[row]), size))
            kept.append(score)
        boxes, scores = torch.cat(boxes), torch.cat(kept)
        solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
        return boxes[solid], scores[solid]

    def targets(self, anchors: Tensor, gt_boxes: Tensor, size: tuple[int, int]):
        """Sampled anchors of one image: rows (P,) to regress, their boxes (P, 4), how many were sampled for it with
        background, rows (S,) to score, their scores (S,). Anchors that leave the image take no part."""
        height, width = size
        inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
        inside = inside.nonzero().squeeze(1)

        def sample(match: tuple, fraction: float) -> tuple[Tensor, Tensor]:
            matched = match_anchors(anchors[inside], gt_boxes, *match)
            decided = (matched > -2).nonzero().squeeze(1)
            drawn = decided[sample_fg_bg(matched[decided] >= 0, self.sampled, fraction)]
            return inside[drawn], matched[drawn]

        rows, matched = sample(self.box_match, self.box_fraction)
        fg = matched >= 0
        scored, owner = sample(self.centre_match, self.centre_fraction)
        scores = torch.zeros(len(scored), device=anchors.device)
        scores[owner >= 0] = centreness(anchors[scored[owner >= 0]], gt_boxes[owner[owner >= 0]])
        return rows[fg], gt_boxes[matched[fg]], len(rows), scored, scores

    def losses(self, anchors: Tensor, tblr: Tensor, logits: Tensor, gt_boxes: list[Tensor], sizes: list) -> dict:
        """tblr (B, M, 4), logits (B, M): both losses, each over the anchors of the batch sampled for regression."""
        targets = [self.targets(anchors, boxes, size) for boxes, size in zip(gt_boxes, sizes)]
        box = sum(loss_rpn_box(anchors[t[0]], tblr[i, t[0]], t[1]) for i, t in enumerate(targets))
        objectness = sum(loss_rpn_objectness(logits[i, t[3]], t[4]) for i, t in enumerate(targets))
        count = max(sum(t[2] for t in targets), 1)
        return {"loss_rpn_box": box / count, "loss_rpn_objectness": objectness / count}


def decode_tblr(anchors: Tensor, tblr: Tensor) -> Tensor:
    """(M, 4) anchors and distances in anchor sides -> (M, 4) xyxy boxes."""
    centre, side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    return torch.cat([centre - tblr[:, [2, 0]] * side, centre + tblr[:, [3, 1]] * side], 1)


def centreness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """sqrt(min(t, b) / max(t, b) * min(l, r) / max(l, r)) of the anchors' centres in their boxes; 0 outside: (M,)."""
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, after = (centre - boxes[:, :2]).clamp(min=0), (boxes[:, 2:] - centre).clamp(min=0)  # (M, 2)
    return (torch.minimum(before, after) / torch.maximum(before, after).clamp(min=1e-6)).prod(1).sqrt()


def loss_rpn_box(anchors: Tensor, tblr: Tensor, gt_boxes: Tensor) -> Tensor:
    """10 (1 - IoU) of the foreground's decoded boxes, summed: anchors, tblr, gt_boxes (P, 4)."""
    return 10 * (1 - paired_iou(decode_tblr(anchors, tblr), gt_boxes).clamp(min=1e-6)).sum()


def loss_rpn_objectness(logits: Tensor, scores: Tensor) -> Tensor:
    """|sigmoid(logit) - centreness| of the sampled anchors, summed: (S,), (S,); 0 is the score of background."""
    return (logits.sigmoid() - scores).abs().sum()
