"""RetinaNet (arXiv 1708.02002): a grid of anchors, two towers of convolutions, one stage.

Source: mmdetection 2.0 (mmdet/models/dense_heads/anchor_head.py and retina_head.py,
core/anchor/anchor_generator.py). torchvision's rounds its anchors and takes its strides from the
padded image, so that its numbers differ.

Shapes: B images, L levels, A anchors of all levels of one image, C classes, F channels.
"""

import math

import torch
from torch import Tensor, nn

from common.backbone import GroupNorm
from common.boxes import sides
from common.compiling import compilable

SCALE = 4  # side of the smallest anchor of a level, in strides
SCALES_PER_OCTAVE = 3  # 1, 2^(1/3) and 2^(2/3) of the smallest side
RATIOS = (0.5, 1.0, 2.0)  # height / width
PER_CELL = SCALES_PER_OCTAVE * len(RATIOS)


def base_anchors(stride: int) -> Tensor:
    """Returns the anchors of a cell at the image's top left corner: (9, 4) xyxy, ratio by ratio."""
    octave = range(SCALES_PER_OCTAVE)
    scales = torch.tensor([SCALE * 2 ** (i / SCALES_PER_OCTAVE) for i in octave])
    heights = torch.tensor(RATIOS).sqrt()[:, None]  # (3, 1), of an area of 1
    widths = 1 / heights
    # in this order, as one rounding error decides which of two anchors is the best one
    sizes = torch.stack([stride * widths * scales, stride * heights * scales], 2)
    half = sizes.flatten(0, 1) / 2  # (9, 2)
    return torch.cat([-half, half], 1)


def grid_anchors(features: list[Tensor], strides: list[int]) -> list[Tensor]:
    """Returns the anchors of each level, row by row: L tensors (h * w * 9, 4).

    Those of the first cell are centred on the image's top left corner.
    features: L maps (B, F, h, w)
    """
    anchors = []
    for feature, stride in zip(features, strides):
        height, width = feature.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        shift = torch.stack([x, y, x, y], 2) * stride  # (h, w, 4)
        level = shift[:, :, None] + base_anchors(stride)  # (h, w, 9, 4)
        anchors.append(level.flatten(0, 2).to(feature.device))
    return anchors


def inside_image(features: list[Tensor], strides: list[int], size: tuple[int, int]) -> Tensor:
    """Returns (A,) bool: the anchors whose cell begins in the image, not in its padding.

    features: L maps (B, F, h, w); size: (height, width) of the image before padding
    """
    parts = []
    for feature, stride in zip(features, strides):
        height, width = feature.shape[-2:]
        rows = torch.arange(height, device=feature.device) * stride < size[0]
        columns = torch.arange(width, device=feature.device) * stride < size[1]
        cells = rows[:, None] & columns  # (h, w)
        parts.append(cells.flatten().repeat_interleave(PER_CELL))
    return torch.cat(parts)


def encode_corners(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Returns how far the corners of the anchors (N, 4) are from those of the boxes (N, 4).

    The unit is the anchor's width or height.
    Source: bwbwzhao/category-extended-detector:mmdet/core/bbox/coder/delta_xyxy_bbox_coder.py
    """
    unit = sides(anchors).repeat(1, 2)  # (N, 4) width, height, width, height
    return (boxes - anchors) / unit


def decode_corners(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Moves the corners of anchors (N, 4) by deltas (N, 4): the inverse of `encode_corners`."""
    unit = sides(anchors).repeat(1, 2)
    return anchors + deltas * unit


class RetinaHead(nn.Module):
    """Scores C classes for each anchor, and moves its box. All levels share the weights."""

    def __init__(self, channels: int, num_classes: int, num_convs: int = 4, norm: str = "none"):
        """Creates the layers. num_convs: of each tower. All scores begin at 0.01.

        With the official 256 channels, weights begin with a deviation of 0.01. It grows in narrower
        towers, whose signal would vanish. With the norm "group" instead of "none", GroupNorm
        follows each convolution of the towers.
        """
        super().__init__()
        self.cls_tower = self._tower(channels, num_convs, norm)
        self.box_tower = self._tower(channels, num_convs, norm)
        self.cls_logits = nn.Conv2d(channels, PER_CELL * num_classes, 3, padding=1)
        self.box_deltas = nn.Conv2d(channels, PER_CELL * 4, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.16 / math.sqrt(channels))
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_logits.bias, -math.log(99))

    @staticmethod
    def _tower(channels: int, num_convs: int, norm: str) -> nn.Sequential:
        layers = []
        for _ in range(num_convs):
            layers.append(nn.Conv2d(channels, channels, 3, padding=1))
            if norm == "group":
                groups = math.gcd(32, channels)
                layers.append(GroupNorm(groups, channels))
            layers.append(nn.ReLU())
        return nn.Sequential(*layers)

    def towers(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Returns what the towers make of L maps (B, F, h, w): for classes, for boxes; L pairs."""
        return [(self.cls_tower(feature), self.box_tower(feature)) for feature in features]

    def outputs(self, towers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Returns class logits (B, A, C) and box deltas (B, A, 4) from L pairs of maps."""
        logits = []
        deltas = []
        for of_classes, of_boxes in towers:
            for maps, found in (
                (self.cls_logits(of_classes), logits),
                (self.box_deltas(of_boxes), deltas),
            ):
                anchors_last = maps.permute(0, 2, 3, 1)  # (B, h, w, 9 * K)
                found.append(anchors_last.reshape(len(maps), -1, maps.shape[1] // PER_CELL))
        return torch.cat(logits, 1).float(), torch.cat(deltas, 1).float()

    @compilable(of_images=True)
    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns class logits (B, A, C) and box deltas (B, A, 4) from L maps (B, F, h, w)."""
        return self.outputs(self.towers(features))


def drop(feature: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Returns dropout of a map, as in training: what remains is divided by 1 - probability."""
    kept = torch.rand(feature.shape, generator=generator, device=feature.device) >= probability
    return feature * kept / (1 - probability)


def best_of_levels(scores: Tensor, counts: list[int], most: int) -> Tensor:
    """Returns the rows of the `most` best anchors of each level, by their best class.

    scores: (A, C); counts: anchors of each level
    """
    rows = []
    start = 0
    for best in scores.amax(1).split(counts):
        _, top = best.topk(min(most, len(best)))
        rows.append(top + start)
        start += len(best)
    return torch.cat(rows)
