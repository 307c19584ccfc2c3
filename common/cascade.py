"""CenterNet2's second stage: a cascade of class-agnostic box heads over P3-P5, and a class-agnostic mask head.

What classifies their regions, the method says. Source: facebookresearch/Detic:detic/modeling/roi_heads
(detic_roi_heads.py, detic_fast_rcnn.py), on top of facebookresearch/detectron2:detectron2/modeling/roi_heads
(cascade_rcnn.py, roi_heads.py, mask_head.py). R counts the regions (RoIs) of all images, Q those of one.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import clip_boxes_to_image

from common.backbone import STRIDES
from common.boxes import box_delta_loss, decode_boxes, pool_rois, two_layers
from common.masks import crop_masks
from common.targets import Targets, match_regions


@dataclass
class StageOutput:
    """What one stage saw and said of its R regions; `targets` in training, what follows them by the method."""

    boxes: list[Tensor]  # B times (Q, 4), the regions
    hidden: Tensor  # (R, fc_dim) output of the box head
    deltas: Tensor  # (R, 4)
    targets: list[Targets]  # B
    cosine: Tensor | None = None  # (R, C)
    logits: Tensor | None = None  # (R, C), in Detic (R, C + 1) on images that have only labels
    prop_logits: Tensor | None = None  # (R, C + 1), of WSDDN
    captions: Tensor | None = None  # (R, M), logits of M captions

    @property
    def labels(self) -> Tensor:
        return torch.cat([t.labels for t in self.targets])  # (R,)


def mlp(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, out))


class BoxStage(nn.Module):
    """Two fully connected layers and class-agnostic box regression."""

    def __init__(self, channels: int, fc_dim: int):
        super().__init__()
        self.box_head = two_layers(
            channels, fc_dim, partial(nn.init.kaiming_uniform_, a=1)
        )  # c2_xavier_fill
        self.bbox_pred = mlp(fc_dim, 4)
        nn.init.normal_(self.bbox_pred[2].weight, std=0.001)
        nn.init.zeros_(self.bbox_pred[2].bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(R, F, 7, 7) -> (R, fc_dim), box deltas (R, 4)."""
        hidden = self.box_head(pooled)
        return hidden, self.bbox_pred(hidden)


class Cascade(nn.Module):
    """Each stage sees, describes and refines the boxes of the one before, which carry no gradient."""

    ious = (0.6, 0.7, 0.8)
    box_weights = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
    strides = STRIDES[:3]

    def __init__(self, channels: int, fc_dim: int):
        super().__init__()
        self.stages = nn.ModuleList(BoxStage(channels, fc_dim) for _ in self.ious)

    def forward(
        self,
        features: list[Tensor],
        boxes: list[Tensor],
        sizes: list,
        truth: list[Targets] | None,
        sample: int,
    ) -> list[StageOutput]:
        """features P3.., boxes B times (Q, 4) -> an output per stage; with `truth` regions are drawn and labelled."""
        outputs = []
        for k, stage in enumerate(self.stages):
            targets = []
            if truth is not None:
                matched = [
                    match_regions(b, t, self.ious[k], sample if k == 0 else 0)
                    for b, t in zip(boxes, truth)
                ]
                boxes, targets = [m[0] for m in matched], [m[1] for m in matched]
            pooled = pool_rois(
                features[: len(self.strides)], self.strides, boxes, 7
            )  # (R, F, 7, 7)
            if (
                pooled.requires_grad
            ):  # the stages share the features: each passes on its part of their gradient
                pooled.register_hook(lambda gradient: gradient / len(self.stages))
            outputs.append(StageOutput(boxes, *stage(pooled), targets))
            boxes = self.refine(k, outputs[-1], sizes)
            if self.training:
                boxes = [b[(b[:, 2:] > b[:, :2]).all(1)] for b in boxes]
        return outputs

    def refine(self, k: int, output: StageOutput, sizes: list) -> list[Tensor]:
        """The boxes of stage k moved by its deltas and clipped to the images: B times (Q, 4), detached."""
        deltas = output.deltas.detach().split([len(b) for b in output.boxes])
        moved = [decode_boxes(b, d, self.box_weights[k]) for b, d in zip(output.boxes, deltas)]
        return [clip_boxes_to_image(b, size) for b, size in zip(moved, sizes)]


def sample_federated(labels: Tensor, frequency: Tensor, num: int = 50) -> Tensor:
    """(C,) 0 or 1: the classes of `labels` (background counts as one), filled up to `num` by draws ~ sqrt(frequency).

    Source: facebookresearch/Detic:detic/modeling/utils.py (get_fed_loss_inds).
    """
    chosen = torch.zeros_like(frequency)
    present = labels.unique()
    chosen[present[present >= 0]] = 1
    chance = frequency.sqrt() * (1 - chosen)  # (C,)
    missing = min(num - len(present), int((chance > 0).sum()))
    if missing > 0:
        chosen[torch.multinomial(chance, missing)] = 1
    return chosen


def draw_classifier(targets: list[Targets], frequency: Tensor, num: int) -> Tensor | None:
    """Detic's dynamic classifier: (K,) the labels of a batch and others up to `num`; None, that is all, for num = 0.

    Others are drawn ~ sqrt(frequency) for boxes, uniformly for image labels; `targets` are rewritten to their places.
    Source: facebookresearch/Detic:detic/modeling/meta_arch/custom_rcnn.py (_sample_cls_inds).
    """
    if not num:
        return None
    if targets[0].image_labels is not None:
        frequency = torch.ones_like(frequency)
    present = torch.cat([t.labels if t.image_labels is None else t.image_labels for t in targets])
    drawn = sample_federated(present, frequency, num).nonzero().squeeze(1)  # (K,)
    place = torch.full_like(frequency, -1, dtype=torch.long).scatter(
        0, drawn, torch.arange(len(drawn)).to(drawn)
    )
    for target in targets:
        target.labels = place[target.labels]
        target.image_labels = None if target.image_labels is None else place[target.image_labels]
    return drawn


def loss_box_reg(k: int, output: StageOutput) -> Tensor:
    """`box_delta_loss` of stage k."""
    boxes, gt_boxes = (
        torch.cat(output.boxes),
        torch.cat([t.boxes for t in output.targets]),
    )  # (R, 4)
    return box_delta_loss(output.deltas, output.labels, boxes, gt_boxes, Cascade.box_weights[k])


class MaskHead(nn.Module):
    """One mask per region, whatever its class; parameter names are the official ones."""

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
        """P3.., boxes B times (Q, 4) -> logits (R, 28, 28)."""
        x = pool_rois(
            features[: len(Cascade.strides)], Cascade.strides, boxes, 14
        )  # (R, F, 14, 14)
        for n in range(1, self.num_convs + 1):
            x = getattr(self, f"mask_fcn{n}")(x).relu()
        return self.predictor(self.deconv(x).relu())[:, 0]

    def loss(self, features: list[Tensor], output: StageOutput) -> Tensor:
        """BCE over the foreground regions of the first stage that have masks: mean over regions and 28 x 28 cells."""
        boxes = [
            b[t.labels >= 0] if t.masks is not None else b[:0]
            for b, t in zip(output.boxes, output.targets)
        ]
        logits = self(features, boxes)  # (R_fg, 28, 28)
        if len(logits) == 0:
            return logits.sum()
        size = logits.shape[-1]
        target = [
            crop_masks(t.masks, b, size, t.owner[t.labels >= 0])
            for b, t in zip(boxes, output.targets)
            if t.masks is not None
        ]
        return F.binary_cross_entropy_with_logits(logits, torch.cat(target).to(logits))
