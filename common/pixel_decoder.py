"""Mask2Former's pixel decoder: deformable attention on strides 32, 16 and 8, then an FPN step.

Source: facebookresearch/Mask2Former:mask2former/modeling/pixel_decoder/msdeformattn.py
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.backbone import GroupNorm
from common.compiling import compilable
from common.errors import InputError
from common.msda import msda
from common.transformer import sine_position

# Shapes: B images, L levels, S tokens (pixels) of all levels, Q queries, C channels, M heads,
# P points, h w height and width of a level.


class MSDeformAttn(nn.Module):
    """Attends to a few points of every level: multi-scale deformable attention (arXiv 2010.04159).

    Each query predicts the points and their weights. The result is the weighted sum of the values
    at the points.
    """

    def __init__(self, channels: int = 256, heads: int = 8, levels: int = 3, points: int = 4):
        super().__init__()
        self.heads = heads
        self.levels = levels
        self.points = points
        samples = heads * levels * points
        self.sampling_offsets = nn.Linear(channels, samples * 2)
        self.attention_weights = nn.Linear(channels, samples)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the layers so that the attention starts with fixed points of equal weight.

        The heads look in M evenly spaced directions. Point p of a head lies p + 1 pixels from the
        reference point, measured along the longer axis: on a square, not on a circle.
        """
        step = 2 * math.pi / self.heads
        angle = torch.arange(self.heads) * step
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # (M, 2)
        longer = direction.abs().amax(1, keepdim=True)
        direction = direction / longer  # on the square
        direction = direction.view(-1, 1, 1, 2)
        distance = torch.arange(1, self.points + 1)
        distance = distance.view(1, 1, -1, 1)
        offsets = direction * distance
        offsets = offsets.expand(-1, self.levels, -1, -1)  # (M, L, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        query: Tensor,
        value_input: Tensor,
        shapes: tuple,
        reference: Tensor,
        padding: Tensor | None = None,
        spread: Tensor | None = None,
    ) -> Tensor:
        """Attends from query (B, Q, C) to value_input (B, S, C). Returns (B, Q, C).

        shapes:    (h, w) of each of the L levels that make up the S tokens
        reference: (Q, 2), (B, Q, 2) or (B, Q, L, 2), reference points as x and y in 0..1
        padding:   (B, S) bool, True for tokens whose value counts as 0; None: there are none
        spread:    (B, Q, L, 2), half the width and height of each reference box, in pixels of the
                   level; an offset of P points to its edge. None: offsets are pixels
        """
        value = self.value_proj(value_input)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0)
        value = value.unflatten(2, (self.heads, -1))  # (B, S, M, C / M)
        samples = (self.heads, self.levels, self.points, 2)
        # bfloat16 would round an offset of 10 pixels by up to 0.03
        with torch.autocast(query.device.type, enabled=False):
            offsets = self.sampling_offsets(query)
        offsets = offsets.unflatten(2, samples)  # (B, Q, M, L, P, 2)
        if spread is not None:
            offsets = offsets * spread[:, :, None, :, None] / self.points
        logits = self.attention_weights(query)
        logits = logits.unflatten(2, (self.heads, -1))  # (B, Q, M, L * P)
        attended = msda(value, shapes, offsets, logits, reference)
        return self.output_proj(attended)


class EncoderLayer(nn.Module):
    """Applies deformable self-attention and feed-forward, each with residual and LayerNorm."""

    def __init__(self, channels: int, ffn: int, heads: int, levels: int, points: int):
        super().__init__()
        self.linear1 = nn.Linear(channels, ffn)
        self.linear2 = nn.Linear(ffn, channels)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
        self.self_attn = MSDeformAttn(channels, heads, levels, points)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        shapes: tuple,
        reference: Tensor,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Returns the updated tokens (B, S, C).

        x:        (B, S, C), tokens of all levels
        position: (1, S, C) or (B, S, C), added to the queries, not to the values
        shapes, reference, padding: as in `MSDeformAttn.forward`, with a query for each token
        """
        query = x + position
        attended = self.self_attn(query, x, shapes, reference, padding)
        x = self.norm1(x + attended)
        hidden = self.linear1(x)
        hidden = F.relu(hidden, inplace=True)
        change = self.linear2(hidden)
        return self.norm2(x + change)


class PixelDecoder(nn.Module):
    """Turns backbone maps into mask features and three maps for the transformer decoder."""

    def __init__(
        self,
        in_channels: list[int],
        channels: int = 256,
        layers: int = 6,
        ffn: int = 1024,
        heads: int = 8,
        points: int = 4,
    ):
        """Creates the layers. Raises InputError if `channels` is not a multiple of 32 (GroupNorm).

        in_channels: of the maps of strides 4, 8, 16, 32; channels: C of the outputs
        layers:      number of `EncoderLayer`s; ffn: their hidden width
        heads, points: as in `MSDeformAttn`
        """
        super().__init__()
        if channels % 32:
            wanted = "must be a multiple of 32, for group normalisation"
            raise InputError(f"--channels {channels} {wanted}")
        res2, *levels = in_channels
        self.input_proj = nn.ModuleList()
        for width in reversed(levels):  # from stride 32 to stride 8
            conv = nn.Conv2d(width, channels, 1)
            norm = GroupNorm(32, channels)
            self.input_proj.append(nn.Sequential(conv, norm))
        embed = torch.randn(len(levels), channels)
        self.level_embed = nn.Parameter(embed)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            layer = EncoderLayer(channels, ffn, heads, len(levels), points)
            self.layers.append(layer)
        lateral = nn.Conv2d(res2, channels, 1, bias=False)
        norm = GroupNorm(32, channels)
        self.lateral = nn.Sequential(lateral, norm)
        smooth = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        norm = GroupNorm(32, channels)
        self.output = nn.Sequential(smooth, norm, nn.ReLU(inplace=True))
        self.mask_features = nn.Conv2d(channels, channels, 1)
        for conv in (lateral, smooth, self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)
        for conv, _ in self.input_proj:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    @compilable(of_images=True)
    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Computes (mask_features, maps).

        features:      4 tensors (B, in_channels[l], h, w) of strides 4, 8, 16, 32
        mask_features: (B, C, h, w) of stride 4
        maps:          3 tensors (B, C, h, w) of strides 32, 16 and 8, for the transformer decoder

        All are float32. Under autocast too, the tokens are, to which each layer adds a little.
        """
        res2 = features[0]
        levels = features[:0:-1]  # of strides 32, 16 and 8
        shapes = []
        areas = []
        pixels = []
        positions = []
        centres = []
        for level, project, embed in zip(levels, self.input_proj, self.level_embed):
            x = project(level).float()
            _, channels, height, width = x.shape
            sine = sine_position(height, width, channels, x.device)
            shapes.append((height, width))
            areas.append(height * width)
            pixels.append(tokens(x))
            positions.append(tokens(sine) + embed)
            centres.append(pixel_centres(height, width, x.device))
        x = torch.cat(pixels, 1)  # (B, S, C)
        position = torch.cat(positions, 1)  # (1, S, C)
        reference = torch.cat(centres)  # (S, 2)
        for layer in self.layers:
            x = layer(x, position, tuple(shapes), reference)
        maps = []
        for part, shape in zip(x.split(areas, 1), shapes):
            part = part.transpose(1, 2)
            maps.append(part.unflatten(2, shape))
        larger = F.interpolate(maps[-1], res2.shape[-2:], mode="bilinear")
        fused = self.lateral(res2) + larger
        return self.mask_features(self.output(fused)).float(), maps


def tokens(feature: Tensor) -> Tensor:
    """Flattens a map: (B, C, h, w) -> (B, h w, C)."""
    return feature.flatten(2).transpose(1, 2)


@compilable(of_images=True)
def decoder_inputs(
    maps: list[Tensor], level_embed: Tensor, mask_features: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Returns what the decoder of masked attention reads at each level, a list each.

    maps: (B, C, h, w) of each of L levels; level_embed: (L, C); mask_features: (B, C, H, W)

    They are the tokens (B, h w, C), their positions (1, h w, C), and the mask features in the
    size of the level (B, C, h, w), without a gradient.
    """
    memory, position, resized = [], [], []
    for features, code in zip(maps, level_embed):
        size = features.shape[-2:]
        memory.append(tokens(features) + code)
        position.append(tokens(sine_position(*size, features.shape[1], features.device)))
        resized.append(F.interpolate(mask_features.detach(), size, mode="bilinear"))
    return memory, position, resized


def pixel_centres(height: int, width: int, device: torch.device) -> Tensor:
    """Returns x, y in 0..1 of the centres of a map's pixels, row by row: (height * width, 2)."""
    row = torch.arange(height, device=device)
    column = torch.arange(width, device=device)
    y = (row + 0.5) / height
    x = (column + 0.5) / width
    grid = torch.meshgrid(x, y, indexing="xy")
    return torch.stack(grid, -1).flatten(0, 1)
