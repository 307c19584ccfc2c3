"""CenterNet2's second stage: a cascade of class-agnostic box heads on P3 to P5, and a mask head.

The classifiers belong to the method files.
Source: facebookresearch/Detic:detic/modeling/roi_heads (detic_roi_heads.py, detic_fast_rcnn.py), on
top of facebookresearch/detectron2:detectron2/modeling/roi_heads (cascade_rcnn.py, roi_heads.py,
mask_head.py).

Shapes: B images, Q regions of one image, R regions of all images, F feature channels.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

from common.backbone import STRIDES
from common.boxes import box_delta_loss, decode_boxes, have_area, pool_rois, two_layers
from common.compiling import compilable
from common.masks import crop_masks
from common.targets import RegionTargets, Targets, match_regions, true_rows

c2_xavier_fill = partial(nn.init.kaiming_uniform_, a=1)  # detectron2's start of a weight


@dataclass
class StageOutput:
    """The regions that one cascade stage gets, and what it computes for them."""

    index: int  # number of the stage, from 0
    boxes: list[Tensor]  # B tensors (Q, 4), the regions
    hidden: Tensor  # (R, fc_dim) output of the box head
    deltas: Tensor  # (R, 4) predicted box deltas
    targets: list[RegionTargets]  # B; empty at inference

    @property
    def labels(self) -> Tensor:
        """(R,) labels of all regions, -1 for background. In training only."""
        return torch.cat([t.labels for t in self.targets])


def mlp(dim: int, out: int) -> nn.Sequential:
    """Returns two linear layers with a ReLU between them: (R, dim) -> (R, out). Starts near 0."""
    first = nn.Linear(dim, dim)
    second = nn.Linear(dim, out)
    c2_xavier_fill(first.weight)
    nn.init.normal_(second.weight, std=0.001)
    for layer in (first, second):
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.ReLU(), second)


class BoxStage(nn.Module):
    """One stage: a box head of two linear layers, and class-agnostic box regression."""

    def __init__(self, channels: int, fc_dim: int):
        super().__init__()
        self.box_head = two_layers(channels, fc_dim, c2_xavier_fill)
        self.bbox_pred = mlp(fc_dim, 4)

    @compilable
    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (R, F, 7, 7) -> hidden (R, fc_dim), box deltas (R, 4)."""
        hidden = self.box_head(pooled)
        return hidden.float(), self.bbox_pred(hidden).float()


class Cascade(nn.Module):
    """Three stages; each pools and refines the boxes of the one before, which carry no gradient."""

    ious = (0.6, 0.7, 0.8)  # least IoU of foreground regions, per stage
    box_weights = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
    strides = STRIDES[:3]

    def __init__(self, channels: int, fc_dim: int):
        super().__init__()
        self.stages = nn.ModuleList(BoxStage(channels, fc_dim) for _ in self.ious)

    def forward(
        self,
        features: list[Tensor],
        boxes: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Targets] | None = None,
        num_samples: int = 0,
    ) -> list[StageOutput]:
        """Runs all stages on the proposals; returns the output of each.

        With targets, every stage matches its regions to the ground truth by its own IoU. The first
        stage also samples `num_samples` regions per image, from the proposals and the ground truth.
        features: P3, P4, P5, ... (B, F, h, w); boxes: B tensors (Q, 4), the proposals
        """
        outputs = []
        for k, stage in enumerate(self.stages):
            if outputs:
                boxes = self.refine(outputs[-1], sizes)
            if outputs and self.training:  # without the boxes that clipping left empty
                filled = true_rows([have_area(b) for b in boxes])
                boxes = [b[rows] for b, rows in zip(boxes, filled)]
            region_targets = []
            if targets is not None:
                number = num_samples if k == 0 else 0
                boxes, region_targets = match_regions(boxes, targets, self.ious[k], number)
            pooled = pool_rois(features[: len(self.strides)], self.strides, boxes, 7)
            if pooled.requires_grad:  # the stages share the features, and average their gradients
                pooled.register_hook(lambda gradient: gradient / len(self.stages))
            hidden, deltas = stage(pooled)
            outputs.append(StageOutput(k, boxes, hidden, deltas, region_targets))
        return outputs

    def refine(self, output: StageOutput, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Returns the boxes of a stage, moved by its deltas and clipped: B tensors (Q, 4)."""
        weights = self.box_weights[output.index]
        counts = [len(boxes) for boxes in output.boxes]
        moved = decode_boxes(torch.cat(output.boxes), output.deltas.detach(), weights)
        return [clip_boxes_to_image(b, size) for b, size in zip(moved.split(counts), sizes)]


def sample_federated(labels: Tensor, frequency: Tensor, num: int = 50) -> Tensor:
    """Samples the classes of the federated loss. Returns (C,): 1 for a sampled class, otherwise 0.

    All classes of `labels` are sampled. If they are fewer than `num`, others are added until there
    are `num`. Background counts as one of them. The others are drawn without replacement, with
    probabilities proportional to sqrt(frequency).
    labels:    (R,), -1 on background
    frequency: (C,), training images of each class; below 0: the class takes no part. It is always
               1, and its regions count as background
    Source: facebookresearch/Detic:detic/modeling/utils.py (get_fed_loss_inds).
    """
    apart = frequency < 0  # (C,)
    labels = labels.masked_fill(apart[labels], -1)
    # of a region or not; the last one is background
    present = F.pad(torch.zeros_like(frequency), (0, 1)).index_fill(0, labels, 1)  # (C + 1,)
    sampled = present[:-1]
    chance = frequency.clamp(min=0).sqrt() * (1 - sampled)  # (C,)
    # those first in a race, at the rate of their chance: drawn without replacement
    time = torch.empty_like(chance).exponential_() / chance
    place = time.argsort().argsort()
    others = (place < num - present.sum()) & (chance > 0)
    return sampled.masked_fill(apart | others, 1)


def loss_box_reg(output: StageOutput) -> Tensor:
    """Box regression loss of a stage: 1/R sum_{r in fg} |d_r - encode(b_r, g_r)|_1, plain L1.

    d (R, 4) are the predicted deltas, b (R, 4) the regions, g (R, 4) their ground truth. encode is
    `encode_boxes` with the stage's `Cascade.box_weights`. R counts background. Without
    regions, the loss is 0.
    """
    boxes = torch.cat(output.boxes)  # (R, 4)
    gt_boxes = torch.cat([t.boxes for t in output.targets])  # (R, 4)
    weights = Cascade.box_weights[output.index]
    return box_delta_loss(output.deltas, output.labels, boxes, gt_boxes, weights)


class MaskHead(nn.Module):
    """Pools regions from the feature maps and predicts one class-agnostic mask for each.

    The parameters have the names of detectron2's mask head.
    """

    def __init__(self, channels: int, num_convs: int = 4):
        super().__init__()
        self.num_convs = num_convs
        for n in range(1, num_convs + 1):
            self.add_module(f"mask_fcn{n}", nn.Conv2d(channels, channels, 3, padding=1))
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.predictor = nn.Conv2d(channels, 1, 1)
        for layer in self.children():  # detectron2's c2_msra_fill
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.predictor.weight, std=0.001)

    def forward(self, features: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """P3, P4, ... (B, F, h, w), boxes B tensors (Q, 4) -> mask logits (R, 28, 28)."""
        strides = Cascade.strides
        return self.predict(pool_rois(features[: len(strides)], strides, boxes, 14))

    @compilable
    def predict(self, x: Tensor) -> Tensor:
        """Pooled features (R, F, 14, 14) -> mask logits (R, 28, 28)."""
        for n in range(1, self.num_convs + 1):
            x = getattr(self, f"mask_fcn{n}")(x).relu()
        return self.predictor(self.deconv(x).relu())[:, 0].float()

    def loss(self, features: list[Tensor], stage: StageOutput, targets: list[Targets]) -> Tensor:
        """BCE of the masks of foreground regions: mean over these regions and their 28 x 28 cells.

        The truth is the mask of the matched ground truth, cropped to the region (`crop_masks`).
        Regions of objects without a mask take no part. Without any other, the loss is 0.
        features: P3, P4, P5, ... (B, F, h, w); stage: of the cascade, the first in Detic
        """
        flags = []
        for matched, image in zip(stage.targets, targets):
            masked = F.pad(image.has_mask, (0, 1))  # without ground truth, its row 0 has no mask
            flags.append((matched.labels >= 0) & masked[matched.gt_index])
        chosen = true_rows(flags)
        boxes = [regions[row] for regions, row in zip(stage.boxes, chosen)]
        rows = [matched.gt_index[row] for matched, row in zip(stage.targets, chosen)]
        logits = self(features, boxes)  # (R_fg, 28, 28)
        if len(logits) == 0:
            return logits.sum()
        size = logits.shape[-1]
        crops = [
            crop_masks(image.masks, b, size, row)
            for image, b, row in zip(targets, boxes, rows)
            if len(b)
        ]
        return F.binary_cross_entropy_with_logits(logits, torch.cat(crops).to(logits))
