"""Swin Transformer (arXiv 2103.14030) as detectors and segmenters use it, on timm's layers."""

from timm.models import FeatureInfo
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

# settings of timm's model: images of any size, and shifted windows in the last stage too, where
# timm's default has a single window of 7 x 7 cells, as for images of 224 pixels
SETTINGS = {"always_partition": True, "strict_img_size": False, "num_classes": 0}


class PaddedBlock(SwinTransformerBlock):
    """Pads the map to whole windows before it is shifted.

    timm pads it afterwards. Then the mask of the shifted windows misses cells that the shift has
    brought from the other side of the map.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window_height, window_width = self.window_size
        padded = F.pad(x, (0, 0, 0, -width % window_width, 0, -height % window_height))
        return super()._attn(padded)[:, :height, :width]


class Swin(nn.Module):
    """Computes a map (B, C, H / stride, W / stride) of the wanted stages, each behind a LayerNorm.

    The names of the parameters are the official ones, except that `downsample` is the first module
    of a stage: "layers.1.downsample" is the official "layers.0.downsample".
    Source: facebookresearch/Detic:detic/modeling/backbone/swintransformer.py;
    facebookresearch/Mask2Former:mask2former/modeling/backbone/swin.py.
    """

    def __init__(self, model: SwinTransformer, strides: list[int]):
        """Takes over the layers of `model`, which was created with SETTINGS.

        strides: of the maps to return; each is 4, 8, 16 or 32
        """
        super().__init__()
        self.patch_embed = model.patch_embed
        self.layers = model.layers
        self.pretrained_cfg = model.pretrained_cfg
        stages = [i for i, stage in enumerate(model.feature_info) if stage["reduction"] in strides]
        self.feature_info = FeatureInfo(model.feature_info, tuple(stages))
        for module in self.layers.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = PaddedBlock
        for i, channels in zip(stages, self.feature_info.channels()):
            self.add_module(f"norm{i}", nn.LayerNorm(channels))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Encodes normalised images (B, 3, H, W). Returns the maps, the finest first."""
        x = self.patch_embed(images)  # (B, h, w, C)
        maps = []
        for i, stage in enumerate(self.layers):
            x = stage(x)
            if norm := getattr(self, f"norm{i}", None):
                maps.append(norm(x).permute(0, 3, 1, 2))
        return maps
