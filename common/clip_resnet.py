"""CLIP's ResNet as a region feature extractor: stem and three stages on the image, the fourth and the attention pool
on each region (C4), so that a region lands in the space of CLIP's text embeddings.

Source: openai/CLIP:clip/model.py (ModifiedResNet), whose parameter names are kept, and
microsoft/RegionCLIP:detectron2/modeling/backbone/clip_backbone.py. E counts the channels of the last stage.
"""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from common.backbone import Backbone
from common.boxes import pool_rois, two_layers
from common.checkpoint import load_plain
from common.distributed import from_main
from common.errors import InputError
from common.hub import hub
from common.targets import Targets

log = logging.getLogger("concord")

MEAN, STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # CLIP's, of pixels in [0, 1]
FILES = (".safetensors", ".pth", ".pt")
# how the same module is called in checkpoints of open_clip, RegionCLIP and UniDetector (mmdet)
PREFIXES = ("visual.", "backbone.", "roi_head.shared_head.", "roi_head.bbox_head.", "")
PARTS = ("conv1.", "conv2.", "conv3.", "bn1.", "bn2.", "bn3.", "layer", "attnpool.")
# what such checkpoints hold besides, and why it is not needed here
LEFT_OUT = {
    "lang_encoder": "text tower",
    "transformer": "text tower",
    "token_embedding": "text tower",
    "positional_embedding": "text tower",
    "ln_final": "text tower",
    "text_projection": "text tower",
    "text": "text tower",
    "logit_scale": "temperature of the contrastive pretraining",
    "proposal_generator": "proposals",
    "rpn_head": "proposals",
    "offline_backbone": "proposals",
    "offline_proposal_generator": "proposals",
    "roi_heads": "box head of another label space",
    "roi_head": "box head of another label space",
    "teacher_backbone": "teacher of the pretraining",
    "pixel_mean": "constants",
    "pixel_std": "constants",
    "input_resolution": "constants",
    "context_length": "constants",
    "vocab_size": "constants",
}


class Bottleneck(nn.Module):
    """Residual block whose stride is an average pool before a 1x1 convolution (anti-aliased)."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int = 1):
        super().__init__()
        out = planes * self.expansion
        self.conv1, self.bn1 = nn.Conv2d(channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = (
            nn.Conv2d(planes, planes, 3, padding=1, bias=False),
            nn.BatchNorm2d(planes),
        )
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(channels, out, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.avgpool(self.bn2(self.conv2(y)).relu())
        y = self.bn3(self.conv3(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class AttentionPool(nn.Module):
    """CLIP's pooling: the mean token asks, the mean and all cells answer."""

    def __init__(self, size: int, channels: int, heads: int, out: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(size**2 + 1, channels) / channels**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        """(R, E, size, size) -> (R, out)."""
        x = x.flatten(2).transpose(1, 2)  # (R, size^2, E)
        x = (
            torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        )  # (R, 1 + size^2, E)
        q, k, v = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        q, k, v = (
            t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v)
        )  # (R, heads, tokens, E / heads)
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))


class CLIPResNetC4(nn.Module):
    """Normalised RGB images -> stride-16 map; regions of it -> (R, out) embeddings beside CLIP's texts.

    name: MODEL/PRETRAINED of open_clip (RN50/openai), MODEL/FILE, or FILE, which is then a RN50's

    BatchNorm runs on its stored statistics and stem and first stage are frozen, where the weights are pretrained.
    """

    stride = 16
    normalise = Backbone.normalise

    def __init__(self, name: str, pretrained: bool = True):
        super().__init__()
        config = architecture(name)
        width, layers, size = config["width"], config["layers"], config["image_size"] // 32
        self.out, self.resolution = config["embed_dim"], 2 * size  # layer4 halves the region
        self.conv1, self.bn1 = (
            nn.Conv2d(3, width // 2, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width // 2),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False),
            nn.BatchNorm2d(width // 2),
        )
        self.conv3, self.bn3 = (
            nn.Conv2d(width // 2, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        channels = width
        for i, depth in enumerate(layers):
            planes, blocks = width * 2**i, []
            for block in range(depth):
                blocks.append(Bottleneck(channels, planes, 2 if i and not block else 1))
                channels = planes * Bottleneck.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(size, channels, max(1, channels // 64), self.out)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) * 255, persistent=False)
        frozen = from_main(pretrained and load_pretrained(self, name))
        self.register_buffer("frozen_norm", torch.tensor(frozen))  # kept with the weights

    def train(self, mode: bool = True) -> "CLIPResNetC4":
        super().train(mode)
        if self.frozen_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()  # its affine part still learns
            for name, parameter in self.named_parameters():
                if name.startswith(("conv", "bn", "layer1.")):
                    parameter.requires_grad_(False)
        return self

    def trunk(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E / 2, H / 16, W / 16)."""
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = bn(conv(x)).relu()
        return self.layer3(self.layer2(self.layer1(F.avg_pool2d(x, 2))))

    def forward(self, images: Tensor, boxes: list[Tensor]) -> Tensor:
        """Normalised images (B, 3, H, W), boxes B times (Q, 4) -> (R, out), not normalised."""
        features = self.trunk(images)
        pooled = pool_rois(
            [features.float()], [self.stride], boxes, self.resolution
        )  # (R, E / 2, r, r)
        return self.attnpool(self.layer4(pooled))


def is_clip(name: str) -> bool:
    """Whether a --classifier-backbone names a CLIP ResNet and not a timm model."""
    return name.startswith("RN") or name.endswith(FILES)


def architecture(name: str) -> dict:
    """Width, layers, image size and output width of the model that `name` starts with."""
    import open_clip

    model = name.partition("/")[0] if name.startswith("RN") else "RN50"
    config = open_clip.get_model_config(model)
    if config is None or not isinstance(config["vision_cfg"]["layers"], list):
        known = ", ".join(
            m for m in open_clip.list_models() if m.startswith("RN") and "gelu" not in m
        )
        raise InputError(
            f"--classifier-backbone {name}: no CLIP ResNet '{model}'; there are {known}"
        )
    return config["vision_cfg"] | {"embed_dim": config["embed_dim"]}


def load_pretrained(model: CLIPResNetC4, name: str) -> bool:
    """Load the weights that `name` names; False, with one line in the log, where the hub's cannot be had."""
    import open_clip

    kind, _, source = name.partition("/") if name.startswith("RN") else ("RN50", "/", name)
    if Path(source).suffix in FILES:
        load_by_prefix(model, read_tensors(Path(source)), source)
        return True
    if source not in open_clip.list_pretrained_tags_by_model(kind):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(kind))
        raise InputError(
            f"--classifier-backbone {name}: no weights '{source}' for {kind}; there are {tags}, or a file"
        )
    try:
        with hub():
            tensors = open_clip.create_model(kind, source).state_dict()
    except Exception as error:  # the hub, torch and open_clip each raise their own kinds
        reason = (
            "the hub cannot be reached"
            if isinstance(error, OSError)
            else str(error).splitlines()[0][:99]
        )
        log.warning("classifier backbone %s starts from RANDOM weights: %s", name, reason)
        return False
    load_by_prefix(model, tensors, name)
    return True


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch file that holds nothing but data."""
    try:
        content = load_file(path) if path.suffix == ".safetensors" else load_plain(path)
    except (OSError, ValueError, SafetensorError) as error:
        if "torchscript" in str(error).lower():
            reason = "it is a TorchScript archive, which holds code; save the model's state_dict()"
        elif not path.is_file():
            reason = "it does not exist; check the path"
        else:
            reason = f"it is no file of plain tensors ({str(error)[:120]}); save it as .safetensors"
        raise InputError(f"--classifier-backbone: {path} cannot be read: {reason}") from None
    for key in ("state_dict", "model"):
        content = content.get(key, content) if isinstance(content, dict) else {}
    content = content if isinstance(content, dict) else {}
    return {
        str(key).removeprefix("module."): t for key, t in content.items() if isinstance(t, Tensor)
    }


def load_by_prefix(model: CLIPResNetC4, tensors: dict[str, Tensor], source: str) -> None:
    """Copy every tensor of the image encoder, whatever its checkpoint calls it; log what else the file holds.

    Raises InputError for a tensor that is missing, has another shape, or belongs to another image encoder.
    """
    own = {key: t for key, t in model.state_dict().items() if key != "frozen_norm"}
    found, rest = {}, Counter()
    for key, tensor in tensors.items():
        prefix = next(p for p in PREFIXES if key.startswith(p))
        name = key.removeprefix(prefix)
        if name in own:
            found[name] = tensor
        elif name.startswith(PARTS):
            raise InputError(f"{source}: tensor '{key}' is not of this CLIP ResNet; write MODEL/{source}, MODEL being "
                             "RN101, RN50x4, ...")  # fmt: skip
        else:
            rest[key.split(".")[0]] += 1
    for key, tensor in own.items():
        if key not in found:
            if not key.endswith("num_batches_tracked"):
                raise InputError(
                    f"{source} lacks '{key}'; give weights of a CLIP ResNet with its attention pool"
                )
            found[key] = tensor
        if found[key].shape != tensor.shape:
            raise InputError(f"{source}: tensor '{key}' has the shape {list(found[key].shape)}, this CLIP ResNet needs "
                             f"{list(tensor.shape)}; name its MODEL: RN50x4/FILE")  # fmt: skip
    model.load_state_dict(found, strict=False)
    log.info("classifier backbone: %d tensors of %s", len(found), source)
    for part, count in rest.items():
        log.info(
            "  not used: %d tensors '%s' (%s)",
            count,
            part,
            LEFT_OUT.get(part, "UNKNOWN to this project"),
        )


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


def region_features(
    name: str, text_dim: int, channels: int, fc_dim: int, pretrained: bool
) -> nn.Module:
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
