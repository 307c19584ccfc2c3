"""CLIP's text transformer and its tokenizer, for a training from random weights.

Source: openai/CLIP:clip/model.py; SHI-Labs/OneFormer:oneformer/modeling/transformer_decoder/
text_transformer.py.
"""

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from common.transformer import Attention

# Shapes: B lists of N texts, U different texts, T tokens, C channels.

TOKENS = 77  # of a text, as CLIP's
VOCABULARY = 49_408  # ids of the tokenizer


@lru_cache(maxsize=1)
def tokenizer() -> Callable[[list[str], int], Tensor]:
    """Returns CLIP's tokenizer, which comes with open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def tokenize(texts: list[str], length: int = TOKENS) -> Tensor:
    """Returns the ids of CLIP's tokens of each text, padded with 0: (U, length)."""
    return tokenizer()(texts, length)


def tokenize_lists(lists: list[list[str]]) -> tuple[Tensor, Tensor]:
    """Returns the ids (U, T) of all different texts, and the row of each text of B lists, (B, N).

    T is the length of the longest text: `TextEncoder` is causal and needs no padding.
    """
    distinct = {text: row for row, text in enumerate(dict.fromkeys(itertools.chain(*lists)))}
    ids = tokenize(list(distinct))
    longest = int(ids.count_nonzero(1).max())
    return ids[:, :longest], torch.tensor([[distinct[text] for text in texts] for texts in lists])


class TextBlock(nn.Module):
    """Applies causal self-attention and feed-forward, each with a norm before it and residual."""

    def __init__(self, width: int):
        super().__init__()
        self.attn = Attention(width, math.gcd(max(1, width // 64), width))
        self.ln_1 = nn.LayerNorm(width)
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, blocked: Tensor) -> Tensor:
        """Returns the updated tokens (U, T, C). x: (U, T, C); blocked: (1, T, T)"""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, blocked)
        hidden = self.c_fc(self.ln_2(x))
        return x + self.c_proj(hidden * (1.702 * hidden).sigmoid())  # CLIP's QuickGELU


class TextEncoder(nn.Module):
    """CLIP's text transformer, small and trained from random weights."""

    def __init__(self, width: int, layers: int, length: int = TOKENS):
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(length, width))
        self.blocks = nn.ModuleList(TextBlock(width) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        for block in self.blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.c_fc.weight, std=(2 * width) ** -0.5)
            for layer in (block.attn.out_proj, block.c_proj):
                nn.init.normal_(layer.weight, std=(2 * layers * width) ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the encoded end token of each text, (U, C). ids: (U, T)"""
        length = ids.shape[1]
        x = self.token_embedding(ids) + self.positional_embedding[:length]  # (U, T, C)
        future = torch.ones(1, length, length, dtype=torch.bool, device=ids.device).triu(1)
        for block in self.blocks:
            x = block(x, future)
        end = ids.argmax(1)[:, None, None].expand(-1, -1, x.shape[2])  # it has the largest id
        return self.ln_final(x.gather(1, end)[:, 0])
