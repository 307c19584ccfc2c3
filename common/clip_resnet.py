"""Region encoders: they map each region (RoI) to a vector in the space of the text embeddings.

There are two: CLIP's ResNet, split as in RegionCLIP ("C4"), and any timm model with an FPN. In C4,
the stem and stages 1 to 3 run on the image. Stage 4 and the attention pool run on each region.
Source: openai/CLIP:clip/model.py (ModifiedResNet), whose parameter names are kept, and
microsoft/RegionCLIP:detectron2/modeling/backbone/clip_backbone.py.

Shapes: B images, Q regions of one image, R regions of all images.
"""

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.backbone import Backbone, normalise
from common.boxes import pool_rois, two_layers
from common.compiling import compilable
from common.distributed import amp_context, from_main
from common.errors import InputError
from common.hub import hub
from common.parts import in_parts
from common.targets import RegionTargets
from common.weight_files import read_tensors

log = logging.getLogger("concord")

STRIDES = [8, 16, 32]  # P3 to P5
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, of pixels in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
FILES = (".safetensors", ".pth", ".pt")
# prefixes of the image encoder's tensors in checkpoints of open_clip, RegionCLIP and UniDetector
PREFIXES = ("visual.", "backbone.", "roi_head.shared_head.", "roi_head.bbox_head.", "")
PARTS = ("conv1.", "conv2.", "conv3.", "bn1.", "bn2.", "bn3.", "layer", "attnpool.")
# other parts of such checkpoints that are not needed here, for the log
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
    """Applies CLIP's residual block: its stride is an average pool before a 1x1 convolution."""

    expansion = 4

    def __init__(self, channels: int, planes: int, stride: int = 1):
        """Creates the block. channels: of the input; planes: a quarter of the output's channels."""
        super().__init__()
        out = planes * self.expansion
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or channels != out:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(channels, out, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, channels, h, w) to (B, 4 * planes, h / stride, w / stride)."""
        y = self.bn1(self.conv1(x)).relu()
        y = self.avgpool(self.bn2(self.conv2(y)).relu())
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            x = self.downsample(x)
        return (y + x).relu()


class AttentionPool(nn.Module):
    """Pools a map to a vector as CLIP does: the mean of all cells attends to itself and the cells.

    E is the number of channels of stage 4, and T = 1 + size^2 the number of tokens.
    """

    def __init__(self, size: int, channels: int, heads: int, out: int):
        """Creates the layers. size: side of the map; channels: E; out: width of the embedding."""
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(size**2 + 1, channels) / channels**0.5)
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (R, E, size, size) to embeddings (R, out)."""
        cells = x.flatten(2).transpose(1, 2)  # (R, size^2, E)
        tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1)  # (R, T, E)
        tokens = tokens + self.positional_embedding

        def split(t: Tensor) -> Tensor:
            return t.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (R, heads, tokens, E / heads)

        q = split(self.q_proj(tokens[:, :1]))
        k = split(self.k_proj(tokens))
        v = split(self.v_proj(tokens))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))


class CLIPResNetC4(nn.Module):
    """Embeds regions with CLIP's ResNet.

    If pretrained weights are loaded, BatchNorm uses its stored statistics, and the stem and first
    stage are frozen.
    """

    stride = 16

    def __init__(self, name: str, pretrained: bool = True):
        """Creates the network. Raises InputError as `architecture` and `load_pretrained` do.

        name: open_clip's MODEL/PRETRAINED (RN50/openai), or MODEL/FILE, or FILE (of an RN50)
        """
        super().__init__()
        config = architecture(name)
        width = config["width"]
        size = config["image_size"] // 32
        self.out = config["embed_dim"]
        self.resolution = 2 * size  # stage 4 halves the region
        half = width // 2
        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        for i, depth in enumerate(config["layers"]):
            planes = width * 2**i
            blocks = []
            for block in range(depth):
                stride = 2 if i > 0 and block == 0 else 1
                blocks.append(Bottleneck(channels, planes, stride))
                channels = planes * Bottleneck.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        heads = max(1, channels // 64)
        self.attnpool = AttentionPool(size, channels, heads, self.out)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) * 255, persistent=False)
        frozen = from_main(pretrained and load_pretrained(self, name))
        self.register_buffer("frozen_norm", torch.tensor(frozen))  # saved with the weights

    def train(self, mode: bool = True) -> "CLIPResNetC4":
        """Sets the mode, but keeps BatchNorm, stem and first stage frozen if pretrained."""
        super().train(mode)
        if self.frozen_norm:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()  # its affine parameters are still trained
            for name, parameter in self.named_parameters():
                if name.startswith(("conv", "bn", "layer1.")):
                    parameter.requires_grad_(False)
        return self

    def normalise(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Applies the function `normalise` with CLIP's mean and standard deviation."""
        return normalise(images, sizes, self.mean, self.std)

    @compilable(of_images=True)
    def trunk(self, x: Tensor) -> Tensor:
        """Runs stem and stages 1 to 3: images (B, 3, H, W) -> (B, E / 2, H / 16, W / 16)."""
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        return self.layer3(self.layer2(self.layer1(F.avg_pool2d(x, 2))))

    def forward(self, images: Tensor, boxes: list[Tensor]) -> Tensor:
        """Embeds the boxes, B tensors (Q, 4), of normalised images (B, 3, H, W): (R, out)."""
        features = self.trunk(images).float()
        pooled = pool_rois([features], [self.stride], boxes, self.resolution)  # (R, E / 2, r, r)
        return self.embed(pooled)

    @compilable
    def embed(self, pooled: Tensor) -> Tensor:
        """Runs stage 4 and the attention pool: regions (R, E / 2, r, r) -> (R, out)."""
        return self.attnpool(self.layer4(pooled)).float()


def architecture(name: str) -> dict:
    """Returns open_clip's settings of the CLIP ResNet in `name`: `vision_cfg` and "embed_dim".

    Raises InputError if open_clip has no such CLIP ResNet.
    """
    import open_clip

    model = name.partition("/")[0] if name.startswith("RN") else "RN50"
    config = open_clip.get_model_config(model)
    if config is None or not isinstance(config["vision_cfg"]["layers"], list):
        models = open_clip.list_models()
        known = ", ".join(m for m in models if m.startswith("RN") and "gelu" not in m)
        raise InputError(f"classifier backbone {name}: no CLIP ResNet '{model}'; there are {known}")
    return config["vision_cfg"] | {"embed_dim": config["embed_dim"]}


def load_pretrained(model: CLIPResNetC4, name: str) -> bool:
    """Loads into `model` the weights that `name` gives, and returns True.

    If the hub cannot give them, logs why and returns False.
    Raises InputError if open_clip has no such weights, and as `read_tensors` and `load_by_prefix`.
    """
    import open_clip

    kind, source = "RN50", name
    if name.startswith("RN"):
        kind, _, source = name.partition("/")
    if Path(source).suffix in FILES:
        load_by_prefix(model, read_tensors(Path(source), "classifier backbone"), source)
        return True
    tags = open_clip.list_pretrained_tags_by_model(kind)
    if source not in tags:
        known = ", ".join(tags)
        raise InputError(
            f"classifier backbone {name}: no weights '{source}' for {kind}; "
            f"there are {known}, or a file"
        )
    try:
        with hub():
            tensors = open_clip.create_model(kind, source).state_dict()
    except Exception as error:  # the hub, torch and open_clip each raise their own kinds
        unreachable = isinstance(error, OSError)
        reason = "the hub cannot be reached" if unreachable else str(error).splitlines()[0][:99]
        log.warning("classifier backbone %s starts from RANDOM weights: %s", name, reason)
        return False
    load_by_prefix(model, tensors, name)
    return True


def load_by_prefix(model: CLIPResNetC4, tensors: dict[str, Tensor], source: str) -> None:
    """Copies the image encoder's tensors into the model, in place, and logs the other tensors.

    tensors: by name; the image encoder's are the model's names behind one of PREFIXES
    source:  name of the weights, for messages
    Raises InputError for a tensor that is missing, of another shape, or of another image encoder.
    """
    own = {key: t for key, t in model.state_dict().items() if key != "frozen_norm"}
    found = {}
    unused = Counter()
    for key, tensor in tensors.items():
        prefix = next(p for p in PREFIXES if key.startswith(p))
        name = key.removeprefix(prefix)
        if name in own:
            found[name] = tensor
        elif name.startswith(PARTS):
            raise InputError(
                f"{source}: tensor '{key}' is not of this CLIP ResNet; "
                f"write MODEL/{source}, MODEL being RN101, RN50x4, ..."
            )
        else:
            unused[key.split(".")[0]] += 1
    for key, tensor in own.items():
        if key not in found:
            if not key.endswith("num_batches_tracked"):
                raise InputError(
                    f"{source} lacks '{key}'; give weights of a CLIP ResNet with its attention pool"
                )
            found[key] = tensor
        if found[key].shape != tensor.shape:
            shape, needed = list(found[key].shape), list(tensor.shape)
            raise InputError(
                f"{source}: tensor '{key}' has the shape {shape}, this CLIP ResNet needs {needed}; "
                "name its MODEL: RN50x4/FILE"
            )
    model.load_state_dict(found, strict=False)
    log.info("classifier backbone: %d tensors of %s", len(found), source)
    for part, count in unused.items():
        reason = LEFT_OUT.get(part, "UNKNOWN to this project")
        log.info("  not used: %d tensors '%s' (%s)", count, part, reason)


@dataclass
class RegionOutput:
    """Holds the classifier's outputs for the sampled regions of a training batch."""

    boxes: list[Tensor]  # B tensors (Q, 4), the regions
    logits: Tensor  # (R, C)
    deltas: Tensor  # (R, 4) predicted box deltas
    targets: list[RegionTargets]  # B


class FPNRegions(nn.Module):
    """Embeds regions with a timm model: P3 to P5, a box head, and a linear layer."""

    def __init__(self, name: str, out: int, channels: int, fc_dim: int, pretrained: bool):
        """Creates the network. Raises InputError if `Backbone` refuses the model.

        name:       name of the timm model
        out:        width of the embeddings
        channels:   width of the FPN
        fc_dim:     width of the box head
        pretrained: load the published weights of the timm model
        """
        super().__init__()
        self.backbone = Backbone(name, channels, pretrained, STRIDES, flag="classifier backbone")
        self.box_head = two_layers(channels, fc_dim)
        self.embedding = nn.Linear(fc_dim, out)

    def normalise(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Normalises the images as `Backbone.normalise` does."""
        return self.backbone.normalise(images, sizes)

    def forward(self, images: Tensor, boxes: list[Tensor]) -> Tensor:
        """Embeds the boxes, B tensors (Q, 4), of normalised images (B, 3, H, W): (R, out)."""
        features = [feature.float() for feature in self.backbone(images)]
        hidden = self.box_head(pool_rois(features, STRIDES, boxes, 7))
        return self.embedding(hidden).float()


def region_features(
    name: str, text_dim: int, channels: int, fc_dim: int, pretrained: bool
) -> CLIPResNetC4 | FPNRegions:
    """Creates the region encoder `name`, whose embeddings have the width `text_dim`.

    A name that starts with RN, or ends as a weight file does, is a `CLIPResNetC4`. It does not use
    `channels` and `fc_dim`. Every other name is the timm model of an `FPNRegions`.
    Raises InputError as these classes do, and if a CLIP ResNet's embeddings have another width.
    """
    if not name.startswith("RN") and not name.endswith(FILES):
        return FPNRegions(name, text_dim, channels, fc_dim, pretrained)
    regions = CLIPResNetC4(name, pretrained)
    if regions.out != text_dim:
        raise InputError(
            f"classifier backbone {name} embeds regions in {regions.out} dimensions, the text "
            f"encoder names in {text_dim}; --text-encoder RN50/openai fits RN50"
        )
    return regions


class RegionClassifier(nn.Module):
    """Embeds regions in the space of the text embeddings, and predicts class-agnostic box deltas.

    The official classifier has one more column, a zero vector for background. Its logit is constant
    and no loss reads it, so this class leaves the column out.
    Source: zhenyuw16/UniDetector:mmdet/models/roi_heads/bbox_heads/bbox_head_clip_partitioned.py.
    """

    def __init__(
        self, name: str, text_dim: int, channels: int, fc_dim: int, pretrained: bool, amp: str
    ):
        """Creates the network.

        amp: autocast of all layers: "on", "off" or "auto", as in `amp_context`
        The other parameters are those of `region_features`, which also raises the InputErrors.
        """
        super().__init__()
        self.amp = amp
        self.regions = region_features(name, text_dim, channels, fc_dim, pretrained)
        self.fc_reg = nn.Linear(text_dim, 4)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        nn.init.zeros_(self.fc_reg.bias)

    @in_parts
    def forward(
        self, images: Tensor, sizes: list[tuple[int, int]], boxes: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns embeddings (R, D) of unit norm and box deltas (R, 4). D is `text_dim`.

        images: (B, 3, H, W) uint8; sizes: B pairs (height, width) before padding
        boxes:  B tensors (Q, 4), the regions
        """
        with amp_context(self.amp, images.device):
            x = self.regions(self.regions.normalise(images, sizes), boxes)  # (R, D)
            deltas = self.fc_reg(x).float()
        return F.normalize(x), deltas
