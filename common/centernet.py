"""CenterNet2's first stage: class-agnostic proposals from a centre heat map on P3 to P7.

Source: xingyizhou/CenterNet2:centernet/modeling/dense_heads (centernet.py, centernet_head.py), with
the settings of facebookresearch/Detic:configs/Base-C2_L_R5021k_640b64_4x.yaml.

Shapes: B images, L levels, M locations of all levels of one image, N boxes of one image.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from common.backbone import GroupNorm
from common.boxes import centres, sides
from common.compiling import compilable
from common.distributed import mean_over_ranks
from common.errors import InputError


class Scale(nn.Module):
    """Multiplies its input by a learned factor, initially 1."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scaled tensor."""
        return x * self.scale


class CenterNetHead(nn.Module):
    """Predicts objectness and box distances at each location, with one head for all levels.

    The parameter names are the official ones.
    """

    def __init__(self, channels: int, num_levels: int, num_convs: int = 4):
        """Creates the layers. Raises InputError if `channels` is not a positive multiple of 32.

        channels: of each feature map; num_convs: convolutions before the two output layers
        """
        super().__init__()
        if channels % 32 or not channels:
            raise InputError(
                f"--channels {channels} must be a multiple of 32, the groups of the head's "
                "GroupNorm"
            )
        tower = []
        for _ in range(num_convs):
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            norm = GroupNorm(32, channels)
            tower += [conv, norm, nn.ReLU()]
        self.bbox_tower = nn.Sequential(*tower)
        self.agn_hm = nn.Conv2d(channels, 1, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, 4, 3, padding=1)
        scales = [Scale() for _ in range(num_levels)]
        self.scales = nn.ModuleList(scales)
        for module in self.modules():
            if not isinstance(module, nn.Conv2d):
                continue
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
        prior = -math.log(99)  # the logit of 0.01
        nn.init.constant_(self.agn_hm.bias, prior)
        nn.init.constant_(self.bbox_pred.bias, 8.0)

    @compilable(of_images=True)
    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Predicts from L maps (B, F, h, w) the objectness logits (B, M) and distances (B, M, 4).

        The distances reach from the location to the left, top, right and bottom side of its box, in
        strides of the level.
        """
        logits = []
        distances = []
        for feature, scale in zip(features, self.scales):
            x = self.bbox_tower(feature)
            ltrb = self.bbox_pred(x).float()
            ltrb = scale(ltrb).relu()
            ltrb = ltrb.flatten(2)
            ltrb = ltrb.transpose(1, 2)  # (B, h * w, 4)
            heat = self.agn_hm(x).float()
            heat = heat.flatten(1)  # (B, h * w)
            logits.append(heat)
            distances.append(ltrb)
        return torch.cat(logits, 1), torch.cat(distances, 1)


@dataclass
class Grid:
    """Holds the M locations of all levels, one per map cell: level by level, row by row."""

    points: Tensor  # (M, 2) x, y in pixels
    strides: Tensor  # (M,)
    levels: Tensor  # (M,)
    shapes: list[tuple[int, int]]  # (h, w) of each level

    @classmethod
    def of(cls, features: list[Tensor], strides: list[int]) -> "Grid":
        """Returns the grid of L maps (B, F, h, w). strides: L numbers, in pixels."""
        device = features[0].device
        shapes = [tuple(feature.shape[-2:]) for feature in features]
        points = []
        for (h, w), stride in zip(shapes, strides):
            rows = torch.arange(h, device=device)
            columns = torch.arange(w, device=device)
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            cells = torch.stack([x, y], -1)
            cells = cells.view(-1, 2)
            middles = cells * stride + stride // 2
            points.append(middles)
        strides = [torch.full((len(p),), s, device=device) for p, s in zip(points, strides)]
        levels = [torch.full((len(p),), i, device=device) for i, p in enumerate(points)]
        points = torch.cat(points).float()
        return cls(points, torch.cat(strides).float(), torch.cat(levels), shapes)


class CenterNet(nn.Module):
    """Proposes class-agnostic boxes, and computes the losses. The constants are Detic's."""

    # a box belongs to each level whose closed range holds half its diagonal, in pixels
    size_ranges = ((0, 80), (64, 160), (128, 320), (256, 640), (512, 1e7))
    min_overlap = 0.8
    min_radius = 4.0
    pos_weight = 0.5
    neg_weight = 0.5
    alpha = 0.25
    gamma = 2
    beta = 4
    ignore_high_fp: float = 0.85  # a negative of this confidence may be an unlabelled object
    score_threshold = 1e-4
    nms_threshold = 0.9

    def __init__(
        self, channels: int, strides: list[int], pre_nms: tuple[int, int], post_nms: tuple[int, int]
    ):
        """Creates the head.

        channels: of each feature map; strides: of the feature maps
        pre_nms:  (training, inference) largest number of proposals per level before NMS
        post_nms: (training, inference) largest number of proposals per image after NMS
        """
        super().__init__()
        self.strides = strides
        self.pre_nms = pre_nms
        self.post_nms = post_nms
        self.register_buffer("ranges", torch.tensor(self.size_ranges), persistent=False)  # (L, 2)
        self.centernet_head = CenterNetHead(channels, len(strides))

    def forward(
        self, features: list[Tensor], gt_boxes: list[Tensor] | None = None
    ) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """Returns (proposals, losses).

        proposals: per image, boxes (Q, 4) and scores (Q,), by falling score and without gradient
        losses:    those of `CenterNet.losses`; an empty dictionary if `gt_boxes` is None
        features:  L tensors (B, F, h, w); gt_boxes: B tensors (N, 4)
        """
        grid = Grid.of(features, self.strides)
        logits, ltrb = self.centernet_head(features)
        losses = {}
        if gt_boxes is not None:
            losses = self.losses(grid, logits, ltrb, gt_boxes)
        with torch.no_grad():
            proposals = self.proposals(grid, logits.sigmoid(), ltrb)
        return proposals, losses

    @compilable
    def targets(self, grid: Grid, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the targets (heatmap, ltrb, centred) of one image with boxes (N, 4).

        heatmap: (M,), h = exp(-min d^2 / r^2), the minimum over all boxes, whatever their size. d
                 is the distance in pixels from the location to the box centre, 0 in the cell of the
                 centre. r^2 is the larger of min_radius^2 and 2 ((1 - o) / (1 + o))^2 area, with o
                 = min_overlap. An h below 1e-4 becomes 0. Without boxes all h are 0.
        ltrb:    (M, 4), distances l, t, r, b in strides; all -1 where no box is regressed. A
                 location regresses a box that it is inside of, whose centre is at most one cell
                 away, and which belongs to its level. Of several it takes the one with the smallest
                 d^2 / r^2.
        centred: (M,), number of boxes of the location's level with the centre in its cell
        A box belongs to a level if half its diagonal is in the level's range in `size_ranges`.
        """
        if len(boxes) == 0:
            heatmap = torch.zeros_like(grid.strides)
            ltrb = grid.points.new_full((len(heatmap), 4), -1)
            return heatmap, ltrb, heatmap
        points = grid.points[:, None]  # (M, 1, 2)
        strides = grid.strides[:, None, None]  # (M, 1, 1)
        centre = centres(boxes)  # (N, 2)
        side = sides(boxes)  # (N, 2)

        # the location of the cell that holds the centre
        index = centre / strides  # (M, N, 2)
        index = index.floor()
        half = strides / 2
        half = half.floor()
        cell = index * strides + half
        offset = points - cell
        offset = offset.abs()
        at_centre = offset == 0
        at_centre = at_centre.all(-1)  # (M, N)

        # heat map: a Gaussian whose radius grows with the box
        difference = points - centre  # (M, N, 2)
        distance2 = (difference**2).sum(-1)  # (M, N)
        distance2 = distance2.masked_fill(at_centre, 0)
        overlap = self.min_overlap
        delta = (1 - overlap) / (1 + overlap)
        area = side.prod(1)  # (N,)
        radius2 = 2 * delta**2 * area
        radius2 = radius2.clamp(min=self.min_radius**2)
        weighted = distance2 / radius2  # (M, N)
        nearest = weighted.amin(1)  # (M,)
        heatmap = torch.exp(-nearest)
        heatmap = heatmap.masked_fill(heatmap < 1e-4, 0)

        # distances: to the nearest box, of those around the location and centred close to it
        half_diagonal = side.norm(dim=1) / 2  # (N,)
        ranges = self.ranges[grid.levels]  # (M, 2)
        low, high = ranges.split(1, 1)  # (M, 1)
        above = half_diagonal >= low  # (M, N)
        below = half_diagonal <= high
        in_level = above & below
        top_left, bottom_right = boxes.chunk(2, 1)
        before = points - top_left
        after = bottom_right - points
        ltrb = torch.cat([before, after], -1)  # (M, N, 4)
        close = offset <= strides
        close = close.all(-1)  # (M, N)
        around = ltrb > 0
        around = around.all(-1)  # (M, N)
        candidate = in_level & close & around
        weighted = weighted.masked_fill(~candidate, torch.inf)
        best, box = weighted.min(1)  # (M,)
        row = torch.arange(len(box), device=box.device)
        ltrb = ltrb[row, box] / strides[:, 0]  # (M, 4)
        without_box = best.isinf()
        ltrb = ltrb.masked_fill(without_box[:, None], -1)
        at_box = at_centre & in_level
        return heatmap, ltrb, at_box.sum(1).to(heatmap)

    def losses(
        self, grid: Grid, logits: Tensor, ltrb: Tensor, gt_boxes: list[Tensor]
    ) -> dict[str, Tensor]:
        """Returns the focal losses of the heat map and the GIoU loss of the distances.

        loss_centernet_pos = 0.5 * 0.25 / n * sum over the n centres of -(1 - p)^2 log(p)
        loss_centernet_neg = 0.5 * 0.75 / n * sum over all locations of -p^2 (1 - h)^4 log(1 - p)
        loss_centernet_loc = 1 / m * `loss_ltrb_giou` of the m locations with distances

        p is sigmoid(logits) clamped to [1e-4, 1 - 1e-4]. `CenterNet.targets` gives the centres, the
        heat map h and the distances. In loss_centernet_neg, a location with p >= 0.85 counts 0.
        n and m are sums over all images, then means over ranks, and at least 1.
        logits: (B, M); ltrb: (B, M, 4), in strides; gt_boxes: B tensors (N, 4)
        """
        targets = [self.targets(grid, boxes) for boxes in gt_boxes]
        heatmap, gt_ltrb, centred = map(torch.stack, zip(*targets))  # (B, M), (B, M, 4), (B, M)
        count = mean_over_ranks(centred.sum()).clamp(min=1)
        pos, neg = self.focal_sums(logits, heatmap, centred)
        regressed = gt_ltrb.amin(-1) >= 0  # (B, M)
        count_reg = regressed.sum().to(logits)
        count_reg = mean_over_ranks(count_reg).clamp(min=1)
        # where nothing is regressed, two equal boxes: their loss is 0, and so is its gradient
        others = ~regressed[..., None]
        ltrb = ltrb.masked_fill(others, 1)
        gt_ltrb = gt_ltrb.masked_fill(others, 1)
        loc = loss_ltrb_giou(ltrb.flatten(0, 1), gt_ltrb.flatten(0, 1))
        pos_weight = self.pos_weight * self.alpha
        neg_weight = self.neg_weight * (1 - self.alpha)
        return {
            "loss_centernet_pos": pos_weight * pos / count,
            "loss_centernet_neg": neg_weight * neg / count,
            "loss_centernet_loc": loc / count_reg,
        }

    @compilable(of_images=True)
    def focal_sums(self, logits: Tensor, heatmap: Tensor, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the two sums of the heat map's losses, see `losses`. All are (B, M)."""
        p = logits.sigmoid()
        p = p.clamp(1e-4, 1 - 1e-4)
        hard = (1 - p) ** self.gamma
        pos = -torch.log(p) * hard * centred
        far = (1 - heatmap) ** self.beta
        confident = p**self.gamma
        neg = -torch.log(1 - p) * confident * far
        ignored = p >= self.ignore_high_fp
        neg = neg.masked_fill(ignored, 0)
        return pos.sum(), neg.sum()

    def proposals(self, grid: Grid, p: Tensor, ltrb: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Selects the proposals of each image: the best of each level, then NMS over all levels.

        Returns boxes (Q, 4), not clipped, and scores sqrt(p) (Q,), by falling score, of each image.
        p: objectness (B, M), in [0, 1]; ltrb: (B, M, 4), distances in strides
        """
        at_inference = int(not self.training)
        limit = self.pre_nms[at_inference]
        start = 0
        rows = []
        for height, width in grid.shapes:
            on_level = p[:, start : start + height * width]
            number = min(height * width, limit)
            best = on_level.topk(number).indices
            rows.append(best + start)
            start += height * width
        rows = torch.cat(rows, 1)  # (B, K)
        p, order = p.gather(1, rows).sort(descending=True, stable=True)
        rows = rows.gather(1, order)
        points = grid.points[rows]
        ltrb = ltrb.gather(1, rows[..., None].expand(-1, -1, 4))
        ltrb = ltrb * grid.strides[rows][..., None]  # in pixels
        before, after = ltrb.chunk(2, 2)
        low = points - before
        high = points + after
        high = torch.maximum(high, low + 0.01)
        boxes = torch.cat([low, high], 2)  # (B, K, 4)
        scores = p.sqrt()
        counts = (p > self.score_threshold).sum(1).tolist()  # a single wait for the device
        proposals = []
        for count, of_image, score in zip(counts, boxes, scores):
            of_image = of_image[:count]
            best = nms(of_image, score[:count], self.nms_threshold)
            best = best[: self.post_nms[at_inference]]
            proposals.append((of_image[best], score[best]))
        return proposals


@compilable
def loss_ltrb_giou(pred: Tensor, target: Tensor) -> Tensor:
    """Sum over P pairs of boxes of 1 - GIoU, where GIoU = (I + 1) / (U + 1) - (H - U) / H.

    I, U and H are the areas of the intersection, the union and the smallest box around both.
    pred, target: (P, 4), distances l, t, r, b in strides; both boxes of a pair share their point
    Source: xingyizhou/CenterNet2:centernet/modeling/layers/iou_loss.py.
    """

    def area(ltrb: Tensor) -> Tensor:
        before, after = ltrb.chunk(2, 1)
        side = before + after
        return side.prod(1)

    both = area(pred) + area(target)
    nearer = torch.minimum(pred, target)
    farther = torch.maximum(pred, target)
    intersection = area(nearer)
    hull = area(farther)
    union = both - intersection
    iou = (intersection + 1) / (union + 1)
    unused = (hull - union) / hull
    giou = iou - unused
    return (1 - giou).sum()
