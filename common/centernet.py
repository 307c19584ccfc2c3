"""CenterNet2's first stage: class-agnostic proposals from a centre heat map on P3-P7.

Source: xingyizhou/CenterNet2:centernet/modeling/dense_heads (centernet.py, centernet_head.py), with the settings of
facebookresearch/Detic:configs/Base-C2_L_R5021k_640b64_4x.yaml. M counts the locations of all levels of one image.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from common.distributed import mean_over_ranks
from common.errors import InputError


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class CenterNetHead(nn.Module):
    """One tower shared by all levels; parameter names are the official ones."""

    def __init__(self, channels: int, num_levels: int, num_convs: int = 4):
        super().__init__()
        if channels % 32 or not channels:
            raise InputError(
                f"--channels {channels} must be a multiple of 32, the groups of the head's GroupNorm"
            )
        tower = []
        for _ in range(num_convs):
            tower += [
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.GroupNorm(32, channels),
                nn.ReLU(),
            ]
        self.bbox_tower = nn.Sequential(*tower)
        self.agn_hm = nn.Conv2d(channels, 1, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, 4, 3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in range(num_levels))
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        nn.init.constant_(self.agn_hm.bias, -math.log(99))  # prior probability 0.01
        nn.init.constant_(self.bbox_pred.bias, 8.0)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """L maps (B, F, h, w) -> objectness logits (B, M) and distances l, t, r, b in strides (B, M, 4)."""
        logits, ltrb = [], []
        for feature, scale in zip(features, self.scales):
            x = self.bbox_tower(feature)
            logits.append(self.agn_hm(x).flatten(1))  # (B, h * w)
            ltrb.append(scale(self.bbox_pred(x)).relu().flatten(2).transpose(1, 2))  # (B, h * w, 4)
        return torch.cat(logits, 1), torch.cat(ltrb, 1)


@dataclass
class Grid:
    """The M locations of all levels, level by level, row by row."""

    points: Tensor  # (M, 2) x, y in pixels
    strides: Tensor  # (M,)
    levels: Tensor  # (M,)
    shapes: list[tuple[int, int]]  # (h, w) of each level

    @classmethod
    def of(cls, features: list[Tensor], strides: list[int]) -> "Grid":
        points, device = [], features[0].device
        shapes = [tuple(f.shape[-2:]) for f in features]
        for (h, w), stride in zip(shapes, strides):
            y, x = torch.meshgrid(
                torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"
            )
            points.append(torch.stack([x, y], -1).view(-1, 2) * stride + stride // 2)
        levels = torch.repeat_interleave(
            torch.arange(len(shapes), device=device),
            torch.tensor([len(p) for p in points], device=device),
        )
        return cls(
            torch.cat(points).float(),
            torch.tensor(strides, device=device).float()[levels],
            levels,
            shapes,
        )


class CenterNet(nn.Module):
    """Proposal network: head, targets, losses and proposals.

    Defaults are Detic's. `size_ranges`: a box belongs to a level if half its diagonal lies in the closed range.
    """

    size_ranges = ((0, 80), (64, 160), (128, 320), (256, 640), (512, 1e7))
    min_overlap, min_radius = 0.8, 4.0
    pos_weight = neg_weight = 0.5
    alpha, gamma, beta = 0.25, 2, 4
    ignore_high_fp: float = 0.85  # a confident negative this high may well be an unlabelled object
    score_threshold, nms_threshold = 1e-4, 0.9

    def __init__(
        self, channels: int, strides: list[int], pre_nms: tuple[int, int], post_nms: tuple[int, int]
    ):
        """`pre_nms` (per level) and `post_nms` (per image): how many proposals to keep in (training, test)."""
        super().__init__()
        self.strides, self.pre_nms, self.post_nms = strides, pre_nms, post_nms
        self.centernet_head = CenterNetHead(channels, len(strides))

    def forward(self, features: list[Tensor], gt_boxes: list[Tensor] | None = None):
        """Proposals per image [(boxes (Q, 4), scores (Q,))] by falling score; losses if `gt_boxes` are given."""
        grid = Grid.of(features, self.strides)
        logits, ltrb = self.centernet_head(features)
        losses = {} if gt_boxes is None else self.losses(grid, logits, ltrb, gt_boxes)
        with torch.no_grad():
            proposals = [self.proposals(grid, p, d) for p, d in zip(logits.sigmoid(), ltrb)]
        return proposals, losses

    def targets(self, grid: Grid, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 4) boxes of one image -> heat map (M,), l, t, r, b in strides (M, 4) (negative: none), centres (P,).

        `centres` are the cells that hold a box centre, once per level the box belongs to (repeats are meant).
        """
        points, strides = grid.points[:, None], grid.strides[:, None, None]  # (M, 1, 2), (M, 1, 1)
        ranges = boxes.new_tensor(self.size_ranges)  # (L, 2)
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2  # (N, 2)
        cell = (centre / strides).floor() * strides + (
            strides / 2
        ).floor()  # (M, N, 2) the location that holds it
        offset = (points - cell).abs()
        distance2 = ((points - centre) ** 2).sum(-1).masked_fill((offset == 0).all(-1), 0)  # (M, N)
        delta = (1 - self.min_overlap) / (1 + self.min_overlap)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        weighted = distance2 / (2 * delta**2 * area).clamp(min=self.min_radius**2)  # (M, N)
        ltrb = torch.cat([points - boxes[:, :2], boxes[:, 2:] - points], -1)  # (M, N, 4)

        half_diagonal = (boxes[:, 2:] - boxes[:, :2]).norm(dim=1) / 2  # (N,)
        in_level = (half_diagonal >= ranges[:, :1]) & (half_diagonal <= ranges[:, 1:])  # (L, N)
        candidate = (
            in_level[grid.levels] & (offset <= strides).all(-1) & (ltrb > 0).all(-1)
        )  # (M, N)
        if len(boxes) == 0:
            return (
                grid.strides.new_zeros(len(points)),
                grid.points.new_full((len(points), 4), -1),
                grid.levels[:0],
            )
        heatmap = torch.exp(-weighted.min(1).values)
        heatmap = heatmap.masked_fill(heatmap < 1e-4, 0)
        best, box = weighted.masked_fill(~candidate, torch.inf).min(1)  # (M,)
        ltrb = ltrb[torch.arange(len(box), device=box.device), box] / grid.strides[:, None]
        ltrb = ltrb.masked_fill(best.isinf()[:, None], -1)
        is_centre = (offset == 0).all(-1) & in_level[grid.levels]  # (M, N)
        return heatmap, ltrb, is_centre.nonzero()[:, 0]

    def losses(
        self, grid: Grid, logits: Tensor, ltrb: Tensor, gt_boxes: list[Tensor]
    ) -> dict[str, Tensor]:
        """Focal loss of the heat map and GIoU loss of the distances, each over the mean count of all ranks."""
        targets = [self.targets(grid, boxes) for boxes in gt_boxes]
        heatmap = torch.stack([t[0] for t in targets])  # (B, M)
        gt_ltrb = torch.stack([t[1] for t in targets])  # (B, M, 4)
        p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)  # (B, M)
        positive = torch.cat([p[i, t[2]] for i, t in enumerate(targets)])  # (P,)
        count = mean_over_ranks(p.new_tensor(float(len(positive)))).clamp(min=1)
        pos = -(torch.log(positive) * (1 - positive) ** self.gamma).sum()
        neg = -torch.log(1 - p) * p**self.gamma * (1 - heatmap) ** self.beta
        neg = neg.masked_fill(p >= self.ignore_high_fp, 0).sum()
        regressed = gt_ltrb.amin(-1) >= 0  # (B, M)
        count_reg = mean_over_ranks(regressed.sum().to(p)).clamp(min=1)
        return {
            "loss_centernet_pos": self.pos_weight * self.alpha * pos / count,
            "loss_centernet_neg": self.neg_weight * (1 - self.alpha) * neg / count,
            "loss_centernet_loc": loss_ltrb_giou(ltrb[regressed], gt_ltrb[regressed]) / count_reg,
        }

    def proposals(self, grid: Grid, p: Tensor, ltrb: Tensor) -> tuple[Tensor, Tensor]:
        """Objectness (M,) and distances (M, 4) of one image -> (Q, 4) boxes, (Q,) scores sqrt(p), by falling score."""
        keep = []
        for level in range(len(self.strides)):
            rows = ((grid.levels == level) & (p > self.score_threshold)).nonzero().squeeze(1)
            keep.append(rows[p[rows].topk(min(len(rows), self.pre_nms[not self.training])).indices])
        keep = torch.cat(keep)
        points, reach = grid.points[keep], ltrb[keep] * grid.strides[keep, None]
        top_left = points - reach[:, :2]
        boxes = torch.cat(
            [top_left, torch.maximum(points + reach[:, 2:], top_left + 0.01)], 1
        )  # (Q, 4)
        scores = p[keep].sqrt()
        best = nms(boxes, scores, self.nms_threshold)[: self.post_nms[not self.training]]
        return boxes[best], scores[best]


def loss_ltrb_giou(pred: Tensor, target: Tensor) -> Tensor:
    """Sum of 1 - GIoU over (P, 4) pairs of distances l, t, r, b from the same point.

    One is added to intersection and union; the penalty uses the areas without it.
    Source: xingyizhou/CenterNet2:centernet/modeling/layers/iou_loss.py.
    """
    area = (pred[:, :2] + pred[:, 2:]).prod(1) + (target[:, :2] + target[:, 2:]).prod(1)
    low, high = torch.minimum(pred, target), torch.maximum(pred, target)
    intersection = (low[:, :2] + low[:, 2:]).prod(1)
    hull = (high[:, :2] + high[:, 2:]).prod(1)
    union = area - intersection
    giou = (intersection + 1) / (union + 1) - (hull - union) / hull
    return (1 - giou).sum()
