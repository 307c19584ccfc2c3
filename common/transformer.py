"""Parts of the masked-attention transformer decoder (Mask2Former, arXiv 2112.01527).

The method files combine them into a decoder.

Source: facebookresearch/Mask2Former:mask2former/modeling/transformer_decoder/
mask2former_transformer_decoder.py and position_encoding.py
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.compiling import compilable

# Shapes: B images, Q queries, C channels, M heads, S = h w pixels of one feature level.


def sine_code(position: Tensor, channels: int) -> Tensor:
    """Returns sines and cosines of positions (...) in 0..1, in turn: (..., channels).

    The wavelengths grow from 1 to almost 10000.
    """
    exponent = torch.arange(0, channels, 2, device=position.device) / channels
    frequency = 10_000**-exponent
    angle = (position * (2 * math.pi))[..., None] * frequency
    waves = torch.stack([angle.sin(), angle.cos()], -1)
    return waves.flatten(-2)


def sine_position(
    height: int, width: int, channels: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Returns the sine position embedding (1, channels, height, width), float32.

    The first half of the channels encodes y, the second half x. Each half interleaves sine and
    cosine. The wavelengths grow from the map's side to almost 10000 times the map's side.
    """

    def code(length: int) -> Tensor:
        pixel = torch.arange(1, length + 1, device=device)
        return sine_code(pixel / (length + 1e-6), channels // 2)  # (length, channels / 2)

    y = code(height).unsqueeze(1)
    y = y.expand(-1, width, -1)
    x = code(width).unsqueeze(0)
    x = x.expand(height, -1, -1)
    embedding = torch.cat([y, x], -1)  # (height, width, channels)
    return embedding.permute(2, 0, 1).unsqueeze(0)


class Attention(nn.Module):
    """Computes multi-head attention with one mask for all heads.

    The parameter names are those of nn.MultiheadAttention.
    """

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
        """Attends from query (B, Q, C) to key and value (B, S, C). Returns (B, Q, C).

        blocked: (B, Q, S) bool, True where a query may not attend to a key; None: nothing is
                 blocked. A query whose row is all True gives NaN.
        """
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        projected = []
        for x, weight, bias in zip((query, key, value), weights, biases):
            x = F.linear(x, weight, bias)
            x = x.unflatten(2, (self.heads, -1))
            projected.append(x.transpose(1, 2))  # (B, M, Q or S, C / M)
        attend = None
        if blocked is not None:
            attend = ~blocked.unsqueeze(1)  # (B, 1, Q, S)
        attended = F.scaled_dot_product_attention(*projected, attend)  # (B, M, Q, C / M)
        attended = attended.transpose(1, 2).flatten(2)
        return self.out_proj(attended)


class DecoderLayer(nn.Module):
    """Applies masked cross-attention, self-attention and feed-forward by three separate methods.

    Each has its residual and LayerNorm.
    """

    def __init__(self, channels: int = 256, heads: int = 8, ffn: int = 2048):
        super().__init__()
        self.cross_attn = Attention(channels, heads)
        self.cross_norm = nn.LayerNorm(channels)
        self.self_attn = Attention(channels, heads)
        self.self_norm = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, ffn)
        self.linear2 = nn.Linear(ffn, channels)
        self.ffn_norm = nn.LayerNorm(channels)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    @compilable
    def cross_attend(
        self, q: Tensor, query_pos: Tensor, memory: Tensor, key_pos: Tensor, blocked: Tensor | None
    ) -> Tensor:
        """Lets queries attend to the pixels of one level, with residual and norm: (B, Q, C).

        q:         (B, Q, C), queries; memory: (B, S, C), pixels
        query_pos: (Q, C) or (B, Q, C), added to the queries
        key_pos:   (1 or B, S, C), added to the keys, not to the values
        blocked:   as in `Attention.forward`
        """
        placed = q + query_pos
        keys = memory + key_pos
        attended = self.cross_attn(placed, keys, memory, blocked)
        return self.cross_norm(q + attended)

    @compilable
    def self_attend(self, q: Tensor, query_pos: Tensor) -> Tensor:
        """Lets the queries attend to each other, with residual and norm: q (B, Q, C) -> (B, Q, C).

        query_pos: (Q, C) or (B, Q, C), added to queries and keys, not to values
        """
        placed = q + query_pos
        attended = self.self_attn(placed, placed, q)
        return self.self_norm(q + attended)

    @compilable
    def feed_forward(self, q: Tensor) -> Tensor:
        """Applies the feed-forward network, with residual and norm: q (B, Q, C) -> (B, Q, C)."""
        hidden = self.linear1(q)
        hidden = F.relu(hidden, inplace=True)
        change = self.linear2(hidden)
        return self.ffn_norm(q + change)


class CrossAttentionLayer(nn.Module):
    """Lets queries look at the image, not at each other: cross-attention, feed-forward, LN each."""

    def __init__(self, channels: int, heads: int, ffn: int):
        super().__init__()
        self.attention = Attention(channels, heads)
        self.norm = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(nn.Linear(channels, ffn), nn.ReLU(), nn.Linear(ffn, channels))
        self.ffn_norm = nn.LayerNorm(channels)

    @compilable
    def forward(self, q: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """Returns the queries q (B, Q, C) after the layer.

        memory: (B, S, C), pixels; padding: (B, S) bool, pixels that are not looked at
        """
        attended = self.attention(q, memory, memory, padding[:, None])
        q = self.norm(q + attended)
        return self.ffn_norm(q + self.ffn(q))


class QueryHead(nn.Module):
    """Normalises queries and computes their mask embeddings.

    Mask2Former calls it before the first layer and after each layer.
    """

    def __init__(self, channels: int = 256):
        super().__init__()
        self.decoder_norm = nn.LayerNorm(channels)
        self.mask_embed = nn.Sequential(
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
        )

    @compilable
    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (z, mask_embed), each (B, Q, C), of queries q (B, Q, C).

        z holds the normalised queries for the classifier. The dot products of mask_embed with the
        mask features are the mask logits.
        """
        z = self.decoder_norm(q)
        return z.float(), self.mask_embed(z).float()


@compilable
@torch.no_grad()
def blocked_pixels(mask_embed: Tensor, level_features: Tensor) -> Tensor:
    """Returns the mask of masked attention, (B, Q, h w) bool: True outside the query's mask.

    A query whose mask is empty is blocked nowhere.
    mask_embed:     (B, Q, C) of `QueryHead`
    level_features: (B, C, h, w), the mask features, resized to the level bilinearly

    Resizing the mask logits would give the same, but it would resize Q maps in every layer.
    """
    logits = mask_embed @ level_features.flatten(2)
    blocked = logits < 0  # sigmoid below 0.5
    empty = blocked.all(2, keepdim=True)
    return blocked & ~empty  # a query with an empty mask attends everywhere
