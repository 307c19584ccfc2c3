"""Plain ViTs: as ViTDet has them (arXiv 2203.16527), or as timm has them; the simple pyramid.

Source: facebookresearch/detectron2:detectron2/modeling/backbone/vit.py and projects/ViTDet.
"""

import functools

import timm
import torch
from timm.layers import Attention, LayerNorm2d
from timm.models import FeatureInfo, vision_transformer, vision_transformer_sam
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn
from torch.nn import functional as F

ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True}  # timm's settings
WINDOW = 14  # side of a window in cells
SIDE = 64  # cells of a map for which the relative positions of global blocks are made: 1024 pixels
# ViTDet's drop path, by a part of the model's name; of B, L and H, and what is larger as H
DROP_PATH = {"large": 0.4, "so400m": 0.4, "huge": 0.5, "giant": 0.5, "giga": 0.5, "7b": 0.5}
DECAY = {32: 0.9, 24: 0.8, 0: 0.7}  # of the learning rate from layer to layer, by least blocks


@functools.cache
def is_plain(name: str) -> bool:
    """Tells whether the timm model `name` is a plain ViT: its blocks have maps of one stride.

    The model is made without memory for its weights, and without a random number.
    """
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
        strides = {row["reduction"] for row in model.feature_info}
    except Exception:  # timm's models raise their own kinds; `create_body` tells what is wrong
        return False
    has_blocks = hasattr(model, "blocks") and hasattr(model, "forward_intermediates")
    return has_blocks and len(strides) == 1


def create(name: str, pretrained: bool = False) -> nn.Module:
    """Creates the plain ViT `name` of timm without its classifier: a `ViTDet` or a `WholeViT`.

    Raises what timm raises. A model for images of one size alone raises at one of another size.
    """
    drop_path = next((rate for part, rate in DROP_PATH.items() if part in name), 0.1)
    options = {"pretrained": pretrained, "num_classes": 0, "drop_path_rate": drop_path}
    try:
        model = timm.create_model(name, **ANY_SIZE, **options)
    except TypeError:  # it has no such settings
        model = timm.create_model(name, **options)
    return ViTDet(model) if is_standard(model) else WholeViT(model)


def is_standard(model: nn.Module) -> bool:
    """Tells whether a timm model is the ViT that ViTDet changes: no registers, standard blocks."""
    blocks = {type(block) for block in model.blocks}
    attention = {type(getattr(block, "attn", None)) for block in model.blocks}
    standard = blocks == {vision_transformer.Block} and attention == {Attention}
    return standard and isinstance(model, VisionTransformer) and model.reg_token is None


def layer_factor(name: str, depth: int) -> float:
    """Returns the learning rate of a ViT's parameter, in units of that of what follows the ViT.

    It falls from layer to layer towards the image. The patches, their positions and what else
    precedes the first block count as one layer. A norm behind the blocks has 1.

    depth: number of blocks
    """
    decay = next(decay for least, decay in DECAY.items() if depth >= least)
    first, _, rest = name.partition(".")
    if first in ("norm", "neck"):
        return 1.0
    before = int(rest.partition(".")[0]) + 1 if first == "blocks" else 0
    return decay ** (depth + 1 - before)


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
        """Takes over the layers of `model`, which `is_standard` and was created with ANY_SIZE."""
        super().__init__()
        self.pretrained_cfg = model.pretrained_cfg
        self.feature_info = FeatureInfo(model.feature_info, (len(model.blocks) - 1,))
        self.patch_embed = model.patch_embed
        self.pos_embed = model.pos_embed  # (1, prefix + side^2, C)
        self.prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        self.norm_pre = model.norm_pre
        self.blocks = model.blocks
        spread = max(len(model.blocks) // 4, 1)
        for i, block in enumerate(model.blocks, 1):
            block.attn = MapAttention(block.attn, window=WINDOW if i % spread else 0)

    def describe(self) -> str:
        """Returns what the blocks attend to, for the log."""
        whole = sum(not block.attn.window for block in self.blocks)
        return f"a ViTDet, windows of {WINDOW} patches, {whole} of {len(self.blocks)} blocks global"

    def layer_factor(self, name: str) -> float:
        """Applies the function `layer_factor`."""
        return layer_factor(name, len(self.blocks))

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


class WholeViT(nn.Module):
    """Computes one map (B, C, H / patch, W / patch) of a timm ViT: that of the last block.

    The blocks, positions, registers and the class token are those that timm has, and so is the
    norm behind the last block, if there is one.
    """

    def __init__(self, model: nn.Module):
        """Takes a ViT of timm, and removes its classifier."""
        super().__init__()
        [last] = model.prune_intermediate_layers(1)
        self.model = model
        self.pretrained_cfg = model.pretrained_cfg
        self.feature_info = FeatureInfo(model.feature_info, (last,))
        for row in self.feature_info.info:
            row["num_chs"] = row.get("num_chs_norm", row["num_chs"])

    def describe(self) -> str:
        """Returns what the blocks attend to, for the log."""
        blocks = self.model.blocks
        windows = sum(bool(getattr(block, "window_size", 0)) for block in blocks)
        kind = type(self.model).__name__
        if windows:
            return f"timm's {kind}, with windows in {windows} of {len(blocks)} blocks"
        return f"timm's {kind}, with global attention in all {len(blocks)} blocks"

    def layer_factor(self, name: str) -> float:
        """Applies the function `layer_factor`."""
        return layer_factor(name.removeprefix("model."), len(self.model.blocks))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encodes normalised images (B, 3, H, W). Returns a list of the one map."""
        return self.model.forward_intermediates(
            images, indices=1, norm=True, intermediates_only=True
        )


class SimplePyramid(nn.Module):
    """Makes maps of strides 4 to 32 from the last map of a plain ViT, and coarser ones from these.

    ViTDet makes strides 4 to 64.
    """

    def __init__(
        self,
        width: int,
        patch: int,
        strides: list[int],
        channels: int = 256,
        top: nn.Module | None = None,
    ):
        """Creates the layers.

        width:    channels of the ViT's map
        patch:    side of a patch of the ViT in pixels
        strides:  strides of the maps to make; above 32 they are those that `top` makes
        channels: of each map that is made
        top:      makes coarser maps, as an `extra_blocks` of torchvision's FPN
        """
        super().__init__()
        self.patch = patch
        self.channels = channels
        self.top = top

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
        self.levels = nn.ModuleList(levels[stride] for stride in strides if stride <= 32)

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
        maps = [level(feature) for level in self.levels]
        if self.top is not None:
            maps, _ = self.top(maps, maps, [])
        return maps
