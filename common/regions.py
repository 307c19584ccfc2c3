"""What embeds regions of an image beside text embeddings: CLIP's ResNet, or any timm model with an FPN."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.backbone import Backbone
from common.boxes import pool_rois, two_layers
from common.clip_resnet import CLIPResNetC4, is_clip
from common.errors import InputError
from common.matcher import Targets

STRIDES = [8, 16, 32]


@dataclass
class RegionOutput:
    """What the classifier says of its R regions in training."""

    boxes: list[Tensor]  # B times (Q, 4)
    logits: Tensor  # (R, C)
    deltas: Tensor  # (R, 4)
    targets: list[Targets]  # B, of Q regions each


class FPNRegions(nn.Module):
    """P3-P5 of a timm model, two fully connected layers, and one to the width of the texts."""

    def __init__(self, name: str, out: int, channels: int, fc_dim: int, pretrained: bool):
        super().__init__()
        self.backbone = Backbone(name, channels, pretrained, STRIDES, flag="--classifier-backbone")
        self.box_head = two_layers(channels, fc_dim)
        self.embedding = nn.Linear(fc_dim, out)

    def normalise(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        return self.backbone.normalise(images, sizes)

    def forward(self, images: Tensor, boxes: list[Tensor]) -> Tensor:
        """Normalised images (B, 3, H, W), boxes B times (Q, 4) -> (R, out), not normalised."""
        features = [f.float() for f in self.backbone(images)]
        with torch.autocast(images.device.type, enabled=False):
            return self.embedding(self.box_head(pool_rois(features, STRIDES, boxes, 7)))


def region_features(name: str, text_dim: int, channels: int, fc_dim: int, pretrained: bool) -> nn.Module:
    """`name` of a CLIP ResNet (channels and fc_dim do not matter) or of a timm model, embedding in text_dim dimensions.

    Raises InputError for a name that is neither, and for a CLIP ResNet of another width.
    """
    if not is_clip(name):
        return FPNRegions(name, text_dim, channels, fc_dim, pretrained)
    regions = CLIPResNetC4(name, pretrained)
    if regions.out != text_dim:
        raise InputError(f"--classifier-backbone {name} embeds regions in {regions.out} dimensions, the text encoder "
                         f"names in {text_dim}; --text-encoder RN50/openai fits RN50")  # fmt: skip
    return regions
