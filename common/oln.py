"""OLN, object localization network (arXiv 2108.06753): how well a box sits on an object, whatever it is.

As UniDetector uses it, with a binary classification beside the two qualities. Source: zhenyuw16/UniDetector, in
mmdet/models: dense_heads/oln_rpn_head.py, roi_heads/oln_roi_head.py, roi_heads/bbox_heads/convfc_bbox_score_head.py.
M counts the anchors of all levels of an image, one per cell, R the regions of all images; tblr are distances to top,
bottom, left and right from an anchor's centre in sides of the anchor.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

from common.backbone import Backbone
from common.boxes import box_delta_loss, decode_boxes, paired_iou, pool_rois, two_layers
from common.distributed import amp_context
from common.targets import Targets, match_anchors, match_regions, sample_fg_bg

STRIDES = [4, 8, 16, 32, 64]
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


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
        hidden = [
            F.normalize(self.rpn_conv(f).relu()) for f in features
        ]  # unit length over channels
        return (
            [self.rpn_reg(x).flatten(2).transpose(1, 2) for x in hidden],
            [self.rpn_obj(x).flatten(1) for x in hidden],
        )

    def anchors(self, features: list[Tensor]) -> list[Tensor]:
        """The square anchors (h * w, 4) of each level, row by row; the first is centred on the image's corner."""
        anchors = []
        for feature, stride in zip(features, STRIDES):
            y, x = (
                torch.arange(n, device=feature.device, dtype=torch.float) * stride
                for n in feature.shape[-2:]
            )
            y, x = torch.meshgrid(y, x, indexing="ij")
            centre, half = torch.stack([x, y], -1).view(-1, 2), self.scale * stride / 2
            anchors.append(torch.cat([centre - half, centre + half], 1))
        return anchors

    def forward(
        self,
        features: list[Tensor],
        sizes: list[tuple[int, int]],
        gt_boxes: list[Tensor] | None = None,
    ):
        """Proposals per image [(boxes (Q, 4), scores (Q,))], level by level; losses if `gt_boxes` are given."""
        anchors = self.anchors(features)
        tblr, logits = self.head(features)
        losses = {}
        if gt_boxes is not None:
            losses = self.losses(
                torch.cat(anchors), torch.cat(tblr, 1), torch.cat(logits, 1), gt_boxes, sizes
            )
        with torch.no_grad():
            proposals = [
                self.proposals(
                    anchors, [t[i] for t in tblr], [o[i].sigmoid() for o in logits], size
                )
                for i, size in enumerate(sizes)
            ]
        return proposals, losses

    def proposals(
        self, anchors: list[Tensor], tblr: list[Tensor], scores: list[Tensor], size: tuple[int, int]
    ):
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

    def losses(
        self, anchors: Tensor, tblr: Tensor, logits: Tensor, gt_boxes: list[Tensor], sizes: list
    ) -> dict:
        """tblr (B, M, 4), logits (B, M): both losses, each over the anchors of the batch sampled for regression."""
        targets = [self.targets(anchors, boxes, size) for boxes, size in zip(gt_boxes, sizes)]
        box = sum(loss_rpn_box(anchors[t[0]], tblr[i, t[0]], t[1]) for i, t in enumerate(targets))
        objectness = sum(loss_rpn_objectness(logits[i, t[3]], t[4]) for i, t in enumerate(targets))
        count = max(sum(t[2] for t in targets), 1)
        return {"loss_rpn_box": box / count, "loss_rpn_objectness": objectness / count}


class OLN(nn.Module):
    """Features P2-P6, region proposal network, and a box head that classifies, moves and rates each region."""

    iou, sampled = (
        0.5,
        512,
    )  # of foreground regions; regions per image, a quarter of them foreground

    def __init__(
        self, backbone: str, channels: int, fc_dim: int, pretrained: bool, amp: str = "off"
    ):
        super().__init__()
        self.amp = amp
        self.backbone = Backbone(backbone, channels, pretrained, STRIDES, freeze_stem=True)
        self.rpn = RPN(channels)
        self.box_head = two_layers(channels, fc_dim)
        self.fc_cls, self.fc_reg, self.fc_iou = (nn.Linear(fc_dim, n) for n in (2, 4, 1))
        for layer, std in ((self.fc_cls, 0.01), (self.fc_reg, 0.001), (self.fc_iou, 0.01)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def head(self, features: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """P2.., boxes B times (Q, 4) -> logits (R, 2) of object and background, deltas (R, 4), IoU logits (R,)."""
        x = self.box_head(pool_rois(features[:4], STRIDES[:4], boxes, 7))  # (R, fc_dim)
        return self.fc_cls(x), self.fc_reg(x), self.fc_iou(x).squeeze(1)

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[Targets] | None = None
    ):
        """images (B, 3, H, W) uint8; with targets, whose classes do not matter, the losses; else for each image

        the refined boxes (Q, 4), clipped to it, and three scores (Q,): object, centreness of the anchor, IoU.
        """
        with amp_context(self.amp, images.device):
            features = self.backbone(self.backbone.normalise(images, sizes))
        features = [f.float() for f in features]
        proposals, losses = self.rpn(features, sizes, targets and [t.boxes for t in targets])
        boxes = [b for b, _ in proposals]
        if targets is not None:
            matched = [match_regions(b, t, self.iou, self.sampled) for b, t in zip(boxes, targets)]
            boxes, targets = [m[0] for m in matched], [m[1] for m in matched]
            return losses | self.losses(self.head(features, boxes), boxes, targets)
        logits, deltas, iou = self.head(features, boxes)
        counts = [len(b) for b in boxes]
        moved = decode_boxes(torch.cat(boxes), deltas, BOX_WEIGHTS).split(counts)
        moved = [clip_boxes_to_image(b, size) for b, size in zip(moved, sizes)]
        s_c, s_r2 = logits.softmax(1)[:, 0].split(counts), iou.sigmoid().split(counts)
        return [(box, c, r1, r2) for box, c, (_, r1), r2 in zip(moved, s_c, proposals, s_r2)]

    def losses(
        self, outputs: tuple, boxes: list[Tensor], targets: list[Targets]
    ) -> dict[str, Tensor]:
        """Each over all R regions; `outputs` of `head`."""
        logits, deltas, iou = outputs
        boxes, gt_boxes = torch.cat(boxes), torch.cat([t.boxes for t in targets])  # (R, 4)
        labels = torch.cat([t.labels for t in targets])  # (R,)
        return {
            "loss_roi_cls": loss_roi_cls(logits, labels),
            "loss_roi_box": box_delta_loss(deltas, labels, boxes, gt_boxes, BOX_WEIGHTS),
            "loss_roi_iou": loss_roi_iou(iou, labels, boxes, gt_boxes),
        }


def decode_tblr(anchors: Tensor, tblr: Tensor) -> Tensor:
    """(M, 4) anchors and distances in anchor sides -> (M, 4) xyxy boxes."""
    centre, side = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    return torch.cat([centre - tblr[:, [2, 0]] * side, centre + tblr[:, [3, 1]] * side], 1)


def centreness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """sqrt(min(t, b) / max(t, b) * min(l, r) / max(l, r)) of the anchors' centres in their boxes; 0 outside: (M,)."""
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, after = (
        (centre - boxes[:, :2]).clamp(min=0),
        (boxes[:, 2:] - centre).clamp(min=0),
    )  # (M, 2)
    return (
        (torch.minimum(before, after) / torch.maximum(before, after).clamp(min=1e-6)).prod(1).sqrt()
    )


def loss_rpn_box(anchors: Tensor, tblr: Tensor, gt_boxes: Tensor) -> Tensor:
    """10 (1 - IoU) of the foreground's decoded boxes, summed: anchors, tblr, gt_boxes (P, 4)."""
    return 10 * (1 - paired_iou(decode_tblr(anchors, tblr), gt_boxes).clamp(min=1e-6)).sum()


def loss_rpn_objectness(logits: Tensor, scores: Tensor) -> Tensor:
    """|sigmoid(logit) - centreness| of the sampled anchors, summed: (S,), (S,); 0 is the score of background."""
    return (logits.sigmoid() - scores).abs().sum()


def loss_roi_cls(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of object (column 0) and background: logits (R, 2), labels (R,), -1 on background. Mean."""
    return F.cross_entropy(logits, (labels < 0).long(), reduction="sum") / max(len(labels), 1)


def loss_roi_iou(logits: Tensor, labels: Tensor, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """|sigmoid(logit) - IoU with the ground truth| of the foreground; sum / all R regions. logits, labels (R,)."""
    fg = labels >= 0
    return (logits[fg].sigmoid() - paired_iou(boxes[fg], gt_boxes[fg])).abs().sum() / max(
        len(labels), 1
    )
