"""Mask2Former's pixel decoder: deformable attention over strides 32, 16 and 8, then one FPN step to stride 4.

Source: facebookresearch/Mask2Former:mask2former/modeling/pixel_decoder/msdeformattn.py
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import InputError
from common.msda import msda
from common.transformer import sine_position

# Shapes: B images, L levels, S tokens (pixels) of all levels, C channels, M heads, P points, H W h w cells of a level.


class MSDeformAttn(nn.Module):
    """Each query reads a few points of every level, at places and with weights that it predicts (arXiv 2010.04159)."""

    def __init__(self, channels: int = 256, heads: int = 8, levels: int = 3, points: int = 4):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(channels, heads * levels * points * 2)
        self.attention_weights = nn.Linear(channels, heads * levels * points)
        self.value_proj, self.output_proj = (
            nn.Linear(channels, channels),
            nn.Linear(channels, channels),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Point p of head m starts p + 1 pixels away on a square, in the head's direction; all weights are equal."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)  # (M, 2)
        direction = direction / direction.abs().amax(1, keepdim=True)
        distance = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        offsets = (direction[:, None, None] * distance).expand(
            -1, self.levels, -1, -1
        )  # (M, L, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(linear.bias)

    def forward(
        self, query: Tensor, value_input: Tensor, shapes: tuple, reference: Tensor
    ) -> Tensor:
        """query (B, Q, C), value_input (B, S, C) -> (B, Q, C).

        shapes: (H, W) of each level; reference: (Q, 2), (B, Q, 2) or (B, Q, L, 2), x and y in 0..1
        """
        value = self.value_proj(value_input).unflatten(2, (self.heads, -1))  # (B, S, M, C / M)
        offsets = self.sampling_offsets(query).unflatten(
            2, (self.heads, self.levels, self.points, 2)
        )
        logits = self.attention_weights(query).unflatten(2, (self.heads, -1))  # (B, Q, M, L * P)
        return self.output_proj(msda(value, shapes, offsets, logits, reference))


class EncoderLayer(nn.Module):
    def __init__(self, channels: int, ffn: int, heads: int, levels: int, points: int):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(channels, ffn), nn.Linear(ffn, channels)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
        self.self_attn = MSDeformAttn(channels, heads, levels, points)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor, shapes: tuple, reference: Tensor) -> Tensor:
        """x (B, S, C), position (1, S, C), reference (S, 2) -> (B, S, C)."""
        x = self.norm1(x + self.self_attn(x + position, x, shapes, reference))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x), inplace=True)))


class PixelDecoder(nn.Module):
    """Feature maps of strides 4, 8, 16 and 32 -> mask features of stride 4, memories of strides 32, 16 and 8."""

    def __init__(
        self, in_channels: list[int], channels: int = 256, layers: int = 6, ffn: int = 1024, heads: int = 8,
        points: int = 4,
    ):  # fmt: skip
        """Raises InputError for a number of channels that the group norms cannot divide."""
        super().__init__()
        if channels % 32:
            raise InputError(
                f"--channels {channels} must be a multiple of 32, for group normalisation"
            )
        res2, *levels = in_channels
        self.input_proj = nn.ModuleList(  # from stride 32 to stride 8
            nn.Sequential(nn.Conv2d(width, channels, 1), nn.GroupNorm(32, channels))
            for width in reversed(levels)
        )
        self.level_embed = nn.Parameter(torch.randn(len(levels), channels))
        self.layers = nn.ModuleList(
            EncoderLayer(channels, ffn, heads, len(levels), points) for _ in range(layers)
        )
        self.lateral = nn.Sequential(
            nn.Conv2d(res2, channels, 1, bias=False), nn.GroupNorm(32, channels)
        )
        smooth = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.output = nn.Sequential(smooth, nn.GroupNorm(32, channels), nn.ReLU(inplace=True))
        self.mask_features = nn.Conv2d(channels, channels, 1)
        for conv in (self.lateral[0], self.output[0], self.mask_features):
            nn.init.kaiming_uniform_(conv.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)
        for conv, _ in self.input_proj:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """[res2 .. res5], (B, ., h, w) each -> mask_features (B, C, h, w) of stride 4, [stride 32, 16, 8] (B, C, ., .).

        In float32, also under autocast: places are too fine for less.
        """
        with torch.autocast(features[0].device.type, enabled=False):
            res2, *levels = (f.float() for f in features)
            maps = [project(f) for project, f in zip(self.input_proj, reversed(levels))]
            shapes = tuple(tuple(f.shape[-2:]) for f in maps)
            position = [
                tokens(sine_position(*shape, f.shape[1], f.device)) + embed
                for shape, f, embed in zip(shapes, maps, self.level_embed)
            ]
            position = torch.cat(position, 1)  # (1, S, C)
            reference = torch.cat(
                [pixel_centres(*shape, res2.device) for shape in shapes]
            )  # (S, 2)
            x = torch.cat([tokens(f) for f in maps], 1)  # (B, S, C)
            for layer in self.layers:
                x = layer(x, position, shapes, reference)
            parts = x.split([height * width for height, width in shapes], 1)
            maps = [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes)]
            larger = F.interpolate(maps[-1], res2.shape[-2:], mode="bilinear")
            return self.mask_features(self.output(self.lateral(res2) + larger)), maps


def tokens(feature: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C); a view, if the map is in channels-last order."""
    return feature.flatten(2).transpose(1, 2)


def pixel_centres(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 2): x, y in 0..1 of a map's pixels, row by row."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
