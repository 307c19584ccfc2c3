"""Region proposals from anchors that have several foreground classes, on P3 to P7.

The sizes of the anchors are one per level, and their shapes three. The method computes the loss of
their classes, from the logits and labels of the sampled anchors.
Source: chengzhengxin/groupsoftmax-simpledet (symbol/builder.py, core/detection_input.py,
operator_cxx/contrib/proposal.cc), which has all sizes of anchors on one map of stride 16.

Shapes: B images, A anchors of all levels of one image, S sampled anchors of all images, P
foreground classes, C labels, N boxes of one image, Q proposals of one image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image

from common.backbone import STRIDES
from common.boxes import decode_boxes, encode_boxes, have_area
from common.compiling import compilable
from common.targets import Targets, match_anchors, match_by_iou, sample_anchors, wholly_inside

WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the box deltas


@dataclass
class Anchors:
    """The sampled anchors of a batch, image by image.

    logits: (S, P + 1), the last column is background
    labels: (S,) foreground class, -1 on background
    counts: anchors of each image
    loss_box: of the foreground anchors, see `RPN.sample`
    """

    logits: Tensor
    labels: Tensor
    counts: list[int]
    loss_box: Tensor


def assign_anchors(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Returns the row of the box of each anchor: (A,), -1 on background, -2 for neither.

    An anchor takes the box that it overlaps most if their IoU is at least 0.7. Of the others, those
    that no anchor overlaps a box more than take this box. What is left is background below 0.3.
    anchors: (A, 4); boxes: (N, 4)
    """
    if len(anchors) == 0:  # in an image smaller than all anchors
        return anchors.new_zeros(0, dtype=torch.long)
    matched = match_anchors(anchors, boxes, 0.7, 0.3, low_iou=1e-6)
    best, is_close = match_by_iou(anchors, boxes, 0.7)
    return torch.where(is_close, best, matched)


class RPN(nn.Module):
    """Predicts the class and the deltas of each anchor, and proposes boxes of any class."""

    size = 4  # side of the square anchor, in strides
    ratios = (0.5, 1.0, 2.0)  # height / width
    sampled = 256  # anchors per image, at most half of them foreground
    nms_threshold = 0.7

    def __init__(
        self, channels: int, class_of: Tensor, pre_nms: tuple[int, int], post_nms: tuple[int, int]
    ):
        """Creates the layers.

        channels: of each feature map
        class_of: (C,) foreground class of each label, 0 .. P - 1
        pre_nms:  (training, inference) largest number of proposals per level before NMS
        post_nms: (training, inference) largest number of proposals per image after NMS
        """
        super().__init__()
        self.register_buffer("class_of", class_of, persistent=False)
        self.pre_nms = pre_nms
        self.post_nms = post_nms
        self.columns = int(class_of.max()) + 2  # P + 1
        shapes = len(self.ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.cls_logits = nn.Conv2d(channels, shapes * self.columns, 1)
        self.bbox_pred = nn.Conv2d(channels, shapes * 4, 1)
        for layer in (self.conv, self.cls_logits, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    @compilable(of_images=True)
    def head(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predicts logits (B, a, P + 1) and deltas (B, a, 4) of the a anchors of each map."""
        logits = []
        deltas = []
        for feature in features:
            hidden = self.conv(feature).relu()
            for found, layer in ((logits, self.cls_logits), (deltas, self.bbox_pred)):
                output = layer(hidden).float()
                output = output.permute(0, 2, 3, 1)  # (B, h, w, shapes * columns)
                columns = output.shape[-1] // len(self.ratios)
                found.append(output.reshape(len(output), -1, columns))
        return logits, deltas

    def anchors(self, features: list[Tensor]) -> list[Tensor]:
        """Returns the anchors of each map, (a, 4): row by row, and all shapes of a cell together.

        features: L maps (B, F, h, w)
        """
        ratios = torch.tensor(self.ratios, device=features[0].device)
        stretch = torch.stack([ratios.rsqrt(), ratios.sqrt()], 1)  # (shapes, 2)
        found = []
        for feature, stride in zip(features, STRIDES):
            h, w = feature.shape[-2:]
            cell = torch.arange(max(h, w), device=feature.device) + 0.5
            y, x = torch.meshgrid(cell[:h], cell[:w], indexing="ij")
            centre = torch.stack([x, y], -1).view(-1, 1, 2) * stride  # (h * w, 1, 2)
            half = stretch * self.size * stride / 2
            corners = torch.cat([centre - half, centre + half], -1)  # (h * w, shapes, 4)
            found.append(corners.view(-1, 4))
        return found

    def forward(
        self,
        features: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Targets] | None = None,
    ) -> tuple[list[tuple[Tensor, Tensor]], Anchors | None]:
        """Returns (proposals, sampled anchors). Without targets there are no anchors.

        proposals: per image, boxes (Q, 4) and scores (Q,), by falling score and without gradient
        features:  L maps (B, F, h, w); sizes: B pairs (height, width) before padding
        """
        anchors = self.anchors(features)
        logits, deltas = self.head(features)
        sampled = None
        if targets is not None:
            joined = (torch.cat(anchors), torch.cat(logits, 1), torch.cat(deltas, 1))
            sampled = self.sample(*joined, sizes, targets)
        proposals = []
        with torch.no_grad():
            for i, size in enumerate(sizes):
                scores = [object_score(level[i]) for level in logits]
                moves = [level[i] for level in deltas]
                proposals.append(self.propose(anchors, scores, moves, size))
        return proposals, sampled

    def sample(
        self,
        anchors: Tensor,
        logits: Tensor,
        deltas: Tensor,
        sizes: list[tuple[int, int]],
        targets: list[Targets],
    ) -> Anchors:
        """Samples anchors of each image, among those wholly inside it.

        Their box loss is the smooth L1 of the foreground's deltas, quadratic below 1/9, summed,
        over 256 B.
        anchors: (A, 4); logits: (B, A, P + 1); deltas: (B, A, 4)
        """
        picked = []
        labels = []
        total = deltas.sum() * 0
        for i, (size, target) in enumerate(zip(sizes, targets)):
            rows = wholly_inside(anchors, size)
            matched = assign_anchors(anchors[rows], target.boxes)
            drawn = sample_anchors(matched, self.sampled, 0.5)
            rows = rows[drawn]
            matched = matched[drawn]
            fg = matched >= 0
            label = torch.full_like(matched, -1)
            label[fg] = self.class_of[target.labels[matched[fg]]]
            wanted = encode_boxes(anchors[rows[fg]], target.boxes[matched[fg]], WEIGHTS)
            moves = deltas[i, rows[fg]]
            total = total + F.smooth_l1_loss(moves, wanted, reduction="sum", beta=1 / 9)
            picked.append(logits[i, rows])
            labels.append(label)
        counts = [len(label) for label in labels]
        loss_box = total / (self.sampled * len(sizes))
        return Anchors(torch.cat(picked), torch.cat(labels), counts, loss_box)

    def propose(
        self, anchors: list[Tensor], scores: list[Tensor], deltas: list[Tensor], size: tuple
    ) -> tuple[Tensor, Tensor]:
        """Selects the proposals of one image: the best of each level, then NMS within the levels.

        Returns boxes (Q, 4), clipped to the image, and scores (Q,), by falling score.
        anchors, scores, deltas: of each level, (a, 4), (a,) and (a, 4); size: (height, width)
        """
        at_inference = int(not self.training)
        boxes = []
        kept = []
        levels = []
        for level, (anchor, score, delta) in enumerate(zip(anchors, scores, deltas)):
            number = min(len(score), self.pre_nms[at_inference])
            best, rows = score.topk(number)
            boxes.append(decode_boxes(anchor[rows], delta[rows], WEIGHTS))
            kept.append(best)
            levels.append(torch.full_like(rows, level))
        boxes = clip_boxes_to_image(torch.cat(boxes), size)
        filled = have_area(boxes)
        boxes = boxes[filled]
        kept = torch.cat(kept)[filled]
        levels = torch.cat(levels)[filled]
        best = batched_nms(boxes, kept, levels, self.nms_threshold)
        best = best[: self.post_nms[at_inference]]
        return boxes[best], kept[best]


def object_score(logits: Tensor) -> Tensor:
    """Returns 1 - p(background) of anchors, (..., P + 1) -> (...); background is the last column.

    Source: chengzhengxin/groupsoftmax-simpledet:operator_cxx/contrib/proposal.cc
    """
    return 1 - logits.softmax(-1)[..., -1]
