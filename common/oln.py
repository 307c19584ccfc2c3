"""OLN, object localization network (arXiv 2108.06753): class-agnostic boxes and their quality.

As in UniDetector, the box head predicts object or background beside the quality (IoU).
Source: zhenyuw16/UniDetector:mmdet/models (dense_heads/oln_rpn_head.py,
roi_heads/oln_roi_head.py, roi_heads/bbox_heads/convfc_bbox_score_head.py).

Shapes: B images, L levels, M anchors of all levels of one image (one per cell), N boxes of one
image, R regions of all images, Q regions or proposals of one image.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

from common.backbone import Backbone
from common.boxes import (
    box_delta_loss,
    centres,
    decode_boxes,
    have_area,
    paired_iou,
    pool_rois,
    sides,
    two_layers,
)
from common.compiling import compilable
from common.distributed import amp_context
from common.parts import in_parts
from common.targets import (
    RegionTargets,
    Targets,
    match_anchors,
    match_regions,
    sample_anchors,
    wholly_inside,
)

STRIDES = [4, 8, 16, 32, 64]  # P2 to P6
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class RPN(nn.Module):
    """Proposes class-agnostic boxes without NMS, and computes the losses.

    Anchors are assigned to the ground truth twice: once to regress boxes, once to score anchors.
    Each assignment has its own IoU thresholds (arguments of `match_anchors`), and its own largest
    share of foreground anchors. The parameter names are the official ones.
    """

    scale = 8  # side of an anchor in strides
    box_match = (0.7, 0.3, 0.3)  # (fg_iou, bg_iou, low_iou) of box regression
    box_fraction = 0.5
    centre_match = (0.3, 0.1, 0.3)  # of the objectness score
    centre_fraction = 1.0
    sampled = 256  # anchors per image and assignment

    def __init__(self, channels: int, pre_nms: int = 2000):
        """Creates the layers. pre_nms: largest number of proposals per level."""
        super().__init__()
        self.pre_nms = pre_nms
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_reg = nn.Conv2d(channels, 4, 1)
        self.rpn_obj = nn.Conv2d(channels, 1, 1)
        for conv in self.children():
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    @compilable(of_images=True)
    def head(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predicts distances for `decode_tblr`, and objectness logits, from L maps (B, F, h, w).

        Returns L tensors (B, h * w, 4) of distances and L tensors (B, h * w) of logits.
        """
        tblr = []
        logits = []
        for feature in features:
            hidden = self.rpn_conv(feature).relu()
            hidden = F.normalize(hidden.float())  # unit length over channels
            distances = self.rpn_reg(hidden).float()
            distances = distances.flatten(2).transpose(1, 2)
            objectness = self.rpn_obj(hidden).float()
            tblr.append(distances)
            logits.append(objectness.flatten(1))
        return tblr, logits

    def anchors(self, features: list[Tensor]) -> list[Tensor]:
        """Returns the square anchors of each level, row by row: L tensors (h * w, 4).

        The first anchor of each level is centred on the image's top left corner.
        features: L maps (B, F, h, w)
        """
        anchors = []
        for feature, stride in zip(features, STRIDES):
            h, w = feature.shape[-2:]
            cell = torch.arange(max(h, w), device=feature.device, dtype=torch.float)
            cell = cell * stride
            y, x = torch.meshgrid(cell[:h], cell[:w], indexing="ij")
            centre = torch.stack([x, y], -1)
            centre = centre.view(-1, 2)
            half = self.scale * stride / 2
            low = centre - half
            high = centre + half
            anchors.append(torch.cat([low, high], 1))
        return anchors

    def forward(
        self,
        features: list[Tensor],
        sizes: list[tuple[int, int]],
        gt_boxes: list[Tensor] | None = None,
    ) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """Returns (proposals, losses).

        proposals: per image, boxes (Q, 4) and scores (Q,), level by level and without gradient
        losses:    those of `RPN.losses`; an empty dictionary if `gt_boxes` is None
        features:  L maps (B, F, h, w); sizes: B pairs (height, width) before padding
        gt_boxes:  B tensors (N, 4)
        """
        anchors = self.anchors(features)
        tblr, logits = self.head(features)
        losses = {}
        if gt_boxes is not None:
            all_anchors = torch.cat(anchors)
            all_tblr = torch.cat(tblr, 1)
            all_logits = torch.cat(logits, 1)
            losses = self.losses(all_anchors, all_tblr, all_logits, gt_boxes, sizes)
        proposals = []
        with torch.no_grad():
            for i, size in enumerate(sizes):
                distances = [level[i] for level in tblr]
                scores = [level[i].sigmoid() for level in logits]
                of_image = self.proposals(anchors, distances, scores, size)
                proposals.append(of_image)
        return proposals, losses

    def proposals(
        self, anchors: list[Tensor], tblr: list[Tensor], scores: list[Tensor], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Selects the best proposals of each level of one image, without NMS.

        Returns boxes (Q, 4), clipped to the image, and scores (Q,), level by level. Empty boxes are
        left out.
        anchors: L tensors (h * w, 4); tblr: L tensors (h * w, 4), as `decode_tblr` reads them
        scores:  L tensors (h * w,), objectness in [0, 1]; size: (height, width) of the image
        """
        boxes = []
        kept = []
        for anchor, distance, score in zip(anchors, tblr, scores):
            number = min(len(score), self.pre_nms)
            best, row = score.topk(number)
            decoded = decode_tblr(anchor[row], distance[row])
            clipped = clip_boxes_to_image(decoded, size)
            boxes.append(clipped)
            kept.append(best)
        boxes = torch.cat(boxes)
        kept = torch.cat(kept)
        not_empty = have_area(boxes)
        return boxes[not_empty], kept[not_empty]

    def targets(
        self, anchors: Tensor, gt_boxes: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, int, Tensor, Tensor]:
        """Samples anchors of one image for both losses, among those wholly inside the image.

        anchors: (M, 4); gt_boxes: (N, 4); size: (height, width) of the image
        Returns (regressed, regressed_boxes, number, scored, scores).
        regressed:       (P,), rows of the foreground anchors whose boxes are regressed
        regressed_boxes: (P, 4), their ground truth
        number:          P plus the background anchors sampled with them
        scored:          (S,), rows of the anchors whose objectness is trained
        scores:          (S,), its target: `centreness` on foreground, 0 on background
        """
        inside = wholly_inside(anchors, size)

        def sample(match: tuple, fraction: float) -> tuple[Tensor, Tensor]:
            matched = match_anchors(anchors[inside], gt_boxes, *match)
            sampled = sample_anchors(matched, self.sampled, fraction)
            return inside[sampled], matched[sampled]  # anchors, their ground truth or -1

        rows, matched = sample(self.box_match, self.box_fraction)
        fg = matched >= 0
        regressed = rows[fg]
        regressed_boxes = gt_boxes[matched[fg]]
        scored, scored_match = sample(self.centre_match, self.centre_fraction)
        scored_fg = scored_match >= 0
        fg_anchors = anchors[scored[scored_fg]]
        fg_boxes = gt_boxes[scored_match[scored_fg]]
        scores = torch.zeros(len(scored), device=anchors.device)
        scores[scored_fg] = centreness(fg_anchors, fg_boxes)
        return regressed, regressed_boxes, len(rows), scored, scores

    def losses(
        self,
        anchors: Tensor,
        tblr: Tensor,
        logits: Tensor,
        gt_boxes: list[Tensor],
        sizes: list[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """Returns `loss_rpn_box` and `loss_rpn_objectness`, summed over images, both divided by n.

        `RPN.targets` samples the anchors of each loss. n is the sum of its `number` over the images
        of the batch, at least 1.
        anchors: (M, 4); tblr: (B, M, 4); logits: (B, M)
        gt_boxes: B tensors (N, 4); sizes: B pairs (height, width) before padding
        """
        box_loss = 0
        objectness_loss = 0
        count = 0
        for i, boxes in enumerate(gt_boxes):
            targets = self.targets(anchors, boxes, sizes[i])
            rows, matched_boxes, number, scored, scores = targets
            box_loss += loss_rpn_box(anchors[rows], tblr[i, rows], matched_boxes)
            objectness_loss += loss_rpn_objectness(logits[i, scored], scores)
            count += number
        count = max(count, 1)
        return {"loss_rpn_box": box_loss / count, "loss_rpn_objectness": objectness_loss / count}


class OLN(nn.Module):
    """Detects class-agnostic boxes: backbone with P2 to P6, RPN, and a box head.

    The box head predicts for each region object or background, box deltas, and the IoU.
    """

    iou = 0.5  # least IoU of foreground regions

    def __init__(
        self,
        backbone: str,
        channels: int,
        fc_dim: int,
        pretrained: bool,
        amp: str = "off",
        rois_per_image: int = 512,
        rpn_proposals: int = 2000,
    ):
        """Creates the network.

        backbone:       name of a timm model, with ImageNet weights if `pretrained`
        channels:       of FPN and RPN; fc_dim: width of the box head
        amp:            autocast of all layers: "on", "off" or "auto", as in `amp_context`
        rois_per_image: regions sampled in training, at most a quarter of them foreground
        rpn_proposals:  largest number of proposals per level
        """
        super().__init__()
        self.amp = amp
        self.rois_per_image = rois_per_image
        self.backbone = Backbone(backbone, channels, pretrained, STRIDES, freeze_stem=True)
        self.rpn = RPN(channels, rpn_proposals)
        self.box_head = two_layers(channels, fc_dim)
        self.fc_cls = nn.Linear(fc_dim, 2)
        self.fc_reg = nn.Linear(fc_dim, 4)
        self.fc_iou = nn.Linear(fc_dim, 1)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        nn.init.normal_(self.fc_iou.weight, std=0.01)
        for layer in (self.fc_cls, self.fc_reg, self.fc_iou):
            nn.init.zeros_(layer.bias)

    @in_parts
    def extract(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Returns P2 to P6 of images (B, 3, H, W) uint8. sizes: (height, width) before padding."""
        normalised = self.backbone.normalise(images, sizes)
        return [feature.float() for feature in self.backbone(normalised)]

    def head(self, features: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns class logits (R, 2), box deltas (R, 4) and IoU logits (R,) of all regions.

        Column 0 of the class logits is object, column 1 is background.
        features: P2 to P6, each (B, F, h, w); P6 is not used. boxes: B tensors (Q, 4), the regions
        """
        pooled = pool_rois(features[:4], STRIDES[:4], boxes, 7)  # (R, F, 7, 7)
        x = self.box_head(pooled)  # (R, fc_dim)
        logits = self.fc_cls(x).float()
        deltas = self.fc_reg(x).float()
        iou = self.fc_iou(x).float()
        return logits, deltas, iou.squeeze(1)

    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], targets: list[Targets] | None = None
    ) -> dict[str, Tensor] | list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Returns the five losses if targets are given, and otherwise the detections of each image.

        The detections of an image are refined boxes (Q, 4), clipped to the image, and three scores
        (Q,) in [0, 1]: probability of an object, RPN score (predicted `centreness`), predicted IoU.
        There is no NMS and no threshold.
        images:  (B, 3, H, W) uint8; sizes: B pairs (height, width) before padding
        targets: of each image; their labels do not change the losses
        """
        gt_boxes = None
        if targets is not None:
            gt_boxes = [t.boxes for t in targets]
        with amp_context(self.amp, images.device):
            features = self.extract(images, sizes)
            proposals, losses = self.rpn(features, sizes, gt_boxes)
            boxes = [b for b, _ in proposals]
            if targets is not None:
                matched = match_regions(boxes, targets, self.iou, self.rois_per_image)
                boxes, region_targets = matched
            logits, deltas, iou = self.head(features, boxes)
        if targets is not None:
            outputs = (logits, deltas, iou)
            return losses | self.losses(outputs, boxes, region_targets)

        counts = [len(b) for b in boxes]
        moved = decode_boxes(torch.cat(boxes), deltas, BOX_WEIGHTS)
        moved = moved.split(counts)
        refined = [clip_boxes_to_image(b, size) for b, size in zip(moved, sizes)]
        probabilities = logits.softmax(1)
        s_c = probabilities[:, 0].split(counts)
        s_r1 = [score for _, score in proposals]
        s_r2 = iou.sigmoid().split(counts)
        return list(zip(refined, s_c, s_r1, s_r2))

    def losses(
        self, outputs: tuple, boxes: list[Tensor], targets: list[RegionTargets]
    ) -> dict[str, Tensor]:
        """Returns `loss_roi_cls`, `loss_roi_box` and `loss_roi_iou` of the R regions of all images.

        outputs: class logits (R, 2), deltas (R, 4) and IoU logits (R,), as `OLN.head` returns them
        boxes:   B tensors (Q, 4), the regions; targets: of the regions of each image
        """
        logits, deltas, iou = outputs
        regions = torch.cat(boxes)  # (R, 4)
        gt_boxes = torch.cat([t.boxes for t in targets])  # (R, 4)
        labels = torch.cat([t.labels for t in targets])  # (R,)
        return {
            "loss_roi_cls": loss_roi_cls(logits, labels),
            "loss_roi_box": loss_roi_box(deltas, boxes, targets),
            "loss_roi_iou": loss_roi_iou(iou, labels, regions, gt_boxes),
        }


def decode_tblr(anchors: Tensor, tblr: Tensor) -> Tensor:
    """Decodes one box per anchor: anchors (M, 4), tblr (M, 4) -> (M, 4) xyxy, not clipped.

    tblr: distances from the anchor's centre to the top, bottom, left and right side of the box,
        divided by the anchor's height (t, b) or width (l, r)
    """
    centre = centres(anchors)
    side = sides(anchors)
    top_left = centre - tblr[:, [2, 0]] * side
    bottom_right = centre + tblr[:, [3, 1]] * side
    return torch.cat([top_left, bottom_right], 1)


def centreness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Returns sqrt(min(t, b) / max(t, b) * min(l, r) / max(l, r)) of each anchor: (M,).

    t, b, l, r are the distances from the anchor's centre to the sides of the box in the same row.
    An anchor whose centre is outside that box gets 0.
    anchors: (M, 4); boxes: (M, 4)
    """
    centre = centres(anchors)
    low, high = boxes.chunk(2, 1)
    before = (centre - low).clamp(min=0)  # (M, 2) l, t
    after = (high - centre).clamp(min=0)  # (M, 2) r, b
    smaller = torch.minimum(before, after)
    larger = torch.maximum(before, after)
    ratio = smaller / larger.clamp(min=1e-6)
    return ratio.prod(1).sqrt()


def loss_rpn_box(anchors: Tensor, tblr: Tensor, gt_boxes: Tensor) -> Tensor:
    """Sum over P foreground anchors of 10 (1 - max(IoU, 1e-6)); each argument is (P, 4).

    IoU compares the box that `decode_tblr` returns with the ground truth in the same row.
    """
    boxes = decode_tblr(anchors, tblr)
    iou = paired_iou(boxes, gt_boxes)
    iou = iou.clamp(min=1e-6)
    return 10 * (1 - iou).sum()


def loss_rpn_objectness(logits: Tensor, scores: Tensor) -> Tensor:
    """Sum over S sampled anchors of |sigmoid(logit) - score|: logits (S,), target scores (S,)."""
    error = logits.sigmoid() - scores
    return error.abs().sum()


def loss_roi_cls(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of object against background, mean over R regions. If R is 0, the loss is 0.

    logits: (R, 2), object in column 0, background in column 1
    labels: (R,), -1 on background; every other value is object
    """
    column = (labels < 0).long()
    total = F.cross_entropy(logits, column, reduction="sum")
    count = max(len(labels), 1)
    return total / count


def loss_roi_box(deltas: Tensor, boxes: list[Tensor], targets: list[RegionTargets]) -> Tensor:
    """Box loss: 1/R sum_{r in fg} |d_r - encode(b_r, g_r)|_1, as in `box_delta_loss`.

    R is the number of regions, background included. If R is 0, the loss is 0. encode is
    `encode_boxes` with BOX_WEIGHTS.
    deltas:  (R, 4), d
    boxes:   B tensors (Q, 4), the regions b
    targets: their ground truth boxes g, and their labels, -1 on background
    """
    regions = torch.cat(boxes)  # (R, 4)
    gt_boxes = torch.cat([t.boxes for t in targets])  # (R, 4)
    labels = torch.cat([t.labels for t in targets])  # (R,)
    return box_delta_loss(deltas, labels, regions, gt_boxes, BOX_WEIGHTS)


def loss_roi_iou(logits: Tensor, labels: Tensor, boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """IoU loss: 1/R sum_{r in fg} |sigmoid(logit_r) - IoU(b_r, g_r)|.

    R is the number of regions, background included. If R is 0, the loss is 0.
    logits: (R,)
    labels: (R,), -1 on background; all other regions are foreground (fg)
    boxes:  (R, 4), b; gt_boxes: (R, 4), g, the matched ground truth, not read on background
    """
    fg = labels >= 0
    iou = paired_iou(boxes[fg], gt_boxes[fg])
    error = logits[fg].sigmoid() - iou
    total = error.abs().sum()
    count = max(len(labels), 1)
    return total / count
