"""Plain ViT as ViTDet has it (arXiv 2203.16527): windows, relative positions, simple pyramid.

Source: facebookresearch/detectron2:detectron2/modeling/backbone/vit.py and projects/ViTDet.
"""

from timm.layers import Attention, LayerNorm2d
from timm.models import FeatureInfo, vision_transformer, vision_transformer_sam
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn
from torch.nn import functional as F

# settings of timm's model: images of any size
SETTINGS = {"dynamic_img_size": True, "dynamic_img_pad": True, "num_classes": 0}
WINDOW = 14  # side of a window in cells
SIDE = 64  # cells of a map for which the relative positions of global blocks are made: 1024 pixels
# (drop path, decay of the learning rate from layer to layer) by a part of the model's name
SIZES = {"large": (0.4, 0.8), "huge": (0.5, 0.9), "": (0.1, 0.7)}


def size_settings(name: str) -> tuple[float, float]:
    """Returns ViTDet's drop path and layer-wise decay for the timm model `name`."""
    return next(settings for size, settings in SIZES.items() if size in name)


class MapAttention(vision_transformer_sam.Attention):
    """Attends within windows of a map, or within the whole map, with relative positions.

    The positions are zero at first. If a map has another size than that which they were made for,
    they are interpolated.
    """

    def __init__(self, attention: Attention, window: int):
        """Takes over the layers of a ViT's attention.

        window: side of a window in cells; 0: attend within the whole map
        """
        side = window or SIDE
        width = attention.qkv.in_features
        heads = attention.num_heads
        super().__init__(width, heads, use_rel_pos=True, input_size=(side, side))
        self.window = window
        self.qkv = attention.qkv
        self.q_norm = attention.q_norm
        self.k_norm = attention.k_norm
        self.proj = attention.proj

    def forward(self, x: Tensor, **unused: object) -> Tensor:
        """Maps (B, h, w, C) to the same shape. `unused`: timm's masks, which no ViT here sets."""
        if not self.window:
            return super().forward(x)
        windows, padded = window_partition(x, self.window)
        return window_unpartition(super().forward(windows), self.window, x.shape[1:3], padded)


class ViTDet(nn.Module):
    """Computes one map (B, C, H / patch, W / patch): that of the last block, without a norm.

    Four blocks, evenly spread, attend to the whole map, the others within windows. There is no
    class token. The names of the parameters are timm's, the attention's those of detectron2 too.
    """

    def __init__(self, model: VisionTransformer):
        """Takes over the layers of `model`, which was created with SETTINGS.

        Raises ValueError for a ViT whose blocks are not the standard ones.
        """
        super().__init__()
        blocks = list(getattr(model, "blocks", []))
        standard = {type(block) for block in blocks} == {vision_transformer.Block}
        if not standard or {type(block.attn) for block in blocks} != {Attention}:
            raise ValueError("it is no standard ViT, whose attention could have windows")
        self.pretrained_cfg = model.pretrained_cfg
        self.feature_info = FeatureInfo(model.feature_info, (len(blocks) - 1,))
        self.patch_embed = model.patch_embed
        self.pos_embed = model.pos_embed  # (1, prefix + side^2, C)
        self.prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        self.norm_pre = model.norm_pre
        self.blocks = model.blocks
        spread = max(len(blocks) // 4, 1)
        for i, block in enumerate(blocks, 1):
            block.attn = MapAttention(block.attn, window=WINDOW if i % spread else 0)

    def layers_behind(self, name: str) -> int:
        """Returns the number of layers from the parameter `name` on, 1 for those of the last block.

        The patches, their positions and what else precedes the first block count as one layer.
        """
        before = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
        return len(self.blocks) + 1 - before

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encodes normalised images (B, 3, H, W). Returns a list of the one map."""
        x = self.patch_embed(images)  # (B, h, w, C)
        x = x + self.positions(x.shape[1:3])
        x = self.blocks(self.norm_pre(x))
        return [x.permute(0, 3, 1, 2)]

    def positions(self, size: tuple[int, int]) -> Tensor:
        """Returns the position codes (1, h, w, C), resized to `size` = (h, w)."""
        codes = self.pos_embed[:, self.prefix :]
        side = int(codes.shape[1] ** 0.5)
        codes = codes.unflatten(1, (side, side))
        if (side, side) != tuple(size):
            codes = F.interpolate(codes.permute(0, 3, 1, 2), size, mode="bicubic")
            codes = codes.permute(0, 2, 3, 1)
        return codes


class SimplePyramid(nn.Module):
    """Makes maps of strides 4 to 32 from the last map of a plain ViT."""

    def __init__(self, width: int, patch: int, strides: list[int], channels: int = 256):
        """Creates the layers.

        width:    channels of the ViT's map
        patch:    side of a patch of the ViT in pixels
        strides:  strides of the maps to make, each 4, 8, 16 or 32
        channels: of each map that is made
        """
        super().__init__()
        self.patch = patch
        self.channels = channels

        def level(*resize: nn.Module, width: int) -> nn.Sequential:
            return nn.Sequential(
                *resize,
                nn.Conv2d(width, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )

        half = width // 2
        quarter = width // 4
        twice = nn.ConvTranspose2d(width, half, 2, stride=2)
        again = nn.ConvTranspose2d(half, quarter, 2, stride=2)
        levels = {
            4: level(twice, LayerNorm2d(half), nn.GELU(), again, width=quarter),
            8: level(nn.ConvTranspose2d(width, half, 2, stride=2), width=half),
            16: level(width=width),
            32: level(nn.MaxPool2d(2), width=width),
        }
        self.levels = nn.ModuleList(levels[stride] for stride in strides)

    def fit(self, images: Tensor) -> Tensor:
        """Resizes images (B, 3, H, W) so that a patch covers 16 x 16 pixels of the original.

        H and W are multiples of 32. If a patch has 16 x 16 pixels, returns `images` itself.
        """
        if self.patch == 16:
            return images
        size = [side * self.patch // 16 for side in images.shape[-2:]]
        return F.interpolate(images, size, mode="bilinear", antialias=True)

    def forward(self, feature: Tensor) -> list[Tensor]:
        """Turns the ViT's map (B, width, H / 16, W / 16) into one map per stride s of `strides`.

        Returns tensors (B, channels, H / s, W / s).
        """
        return [level(feature) for level in self.levels]
