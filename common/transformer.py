"""The masked-attention transformer decoder's parts (Mask2Former, arXiv 2112.01527); the loop is in the method files.

Source: facebookresearch/Mask2Former:mask2former/modeling/transformer_decoder/mask2former_transformer_decoder.py
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Shapes: B images, Q queries, S pixels of one feature level, C channels, M heads, h w cells of one level.


def sine_position(
    height: int, width: int, channels: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Position code (1, channels, height, width) float32: the first half of the channels tells y, the second x.

    Each half interleaves sine and cosine of wavelengths up to 10000 times the map.
    Source: facebookresearch/Mask2Former:mask2former/modeling/transformer_decoder/position_encoding.py
    """
    frequency = 10_000 ** -(torch.arange(0, channels // 2, 2, device=device) / (channels // 2))

    def code(length: int) -> Tensor:
        position = torch.arange(1, length + 1, device=device) / (length + 1e-6) * (2 * math.pi)
        angle = position[:, None] * frequency
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)  # (length, channels / 2)

    y = code(height)[:, None].expand(-1, width, -1)
    x = code(width)[None].expand(height, -1, -1)
    return torch.cat([y, x], -1).permute(2, 0, 1)[None]


class Attention(nn.Module):
    """Multi-head attention with the parameters of nn.MultiheadAttention; its masks are the same for all heads."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, blocked: Tensor | None = None
    ) -> Tensor:
        """query (B, Q, C), key and value (B, S, C) -> (B, Q, C).

        blocked: (B, Q, S) bool, True where a query may not attend; a row that blocks everything gives NaN
        """
        projections = zip(
            (query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        )
        q, k, v = (
            F.linear(x, w, b).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x, w, b in projections
        )
        attend = None if blocked is None else ~blocked[:, None]  # (B, 1, Q, S)
        attended = F.scaled_dot_product_attention(q, k, v, attend)  # (B, M, Q, C / M)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward: three steps, each added to the queries, then normalised."""

    def __init__(self, channels: int = 256, heads: int = 8, ffn: int = 2048):
        super().__init__()
        self.cross_attn, self.cross_norm = Attention(channels, heads), nn.LayerNorm(channels)
        self.self_attn, self.self_norm = Attention(channels, heads), nn.LayerNorm(channels)
        self.linear1, self.linear2 = nn.Linear(channels, ffn), nn.Linear(ffn, channels)
        self.ffn_norm = nn.LayerNorm(channels)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def cross_attend(
        self, q: Tensor, query_pos: Tensor, memory: Tensor, key_pos: Tensor, blocked: Tensor | None
    ) -> Tensor:
        """Queries (B, Q, C) attend to the pixels of one level, memory (B, S, C), but for the `blocked` (B, Q, S) ones.

        query_pos (Q, C) or (B, Q, C) and key_pos (1, S, C) tell where, and are in no value.
        """
        return self.cross_norm(
            q + self.cross_attn(q + query_pos, memory + key_pos, memory, blocked)
        )

    def self_attend(self, q: Tensor, query_pos: Tensor) -> Tensor:
        """Queries (B, Q, C) attend to each other."""
        placed = q + query_pos
        return self.self_norm(q + self.self_attn(placed, placed, q))

    def feed_forward(self, q: Tensor) -> Tensor:
        """Queries (B, Q, C), each on its own."""
        return self.ffn_norm(q + self.linear2(F.relu(self.linear1(q), inplace=True)))


class QueryHead(nn.Module):
    """What is read off the queries before the first layer and after each: the normed query and its mask embedding."""

    def __init__(self, channels: int = 256):
        super().__init__()
        self.decoder_norm = nn.LayerNorm(channels)
        self.mask_embed = nn.Sequential(
            nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU(),
            nn.Linear(channels, channels),
        )  # fmt: skip

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, Q, C) -> z (B, Q, C), for the classifier, and mask_embed (B, Q, C), whose dot products with the mask
        features are mask logits."""
        z = self.decoder_norm(q)
        return z, self.mask_embed(z)


@torch.no_grad()
def blocked_pixels(mask_embed: Tensor, level_features: Tensor) -> Tensor:
    """mask_embed (B, Q, C), level_features (B, C, h, w) -> (B, Q, h * w) bool: pixels a query's last mask leaves out.

    level_features: the mask features, resized to the level bilinearly. The masks themselves would give the same:
    resizing is linear, so it may come before the dot product, for 3 maps instead of Q in every layer.
    """
    blocked = mask_embed @ level_features.flatten(2) < 0  # (B, Q, S): a sigmoid below 0.5
    return blocked & ~blocked.all(2, keepdim=True)  # a query with an empty mask attends everywhere
