"""Queries adapted to a dataset by a learned token and by its class embeddings.

Detection Hub (arXiv 2206.03484). Its code was not released and its equations were not available:
the form follows its abstract. Shapes: B images, Q queries, C classes, D width of text, d channels.
"""

import torch
from torch import Tensor, nn


class AdaptedQueries(nn.Module):
    """Computes q = LN(Q_0 + MHA(Q_0, [P E_s; g_s])), then a feed-forward network, with LN, too.

    E_s are the class embeddings of dataset s, P is a linear layer that all datasets share, and g_s
    is a token of the dataset. At first the adaptation adds nothing to Q_0.
    """

    def __init__(self, queries: int, channels: int, text_dim: int, datasets: int, heads: int = 8):
        super().__init__()
        initial = torch.randn(queries, channels)
        tokens = torch.randn(datasets, channels)
        self.initial = nn.Parameter(initial)  # Q_0
        self.tokens = nn.Parameter(tokens)  # (K, d), a row g_s for each dataset
        self.projection = nn.Linear(text_dim, channels)
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.norm = nn.LayerNorm(channels)
        hidden = nn.Linear(channels, 4 * channels)
        change = nn.Linear(4 * channels, channels)
        self.ffn = nn.Sequential(hidden, nn.ReLU(), change)
        self.ffn_norm = nn.LayerNorm(channels)
        for layer in (self.attention.out_proj, change):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Tensor, text: Tensor, dataset: int) -> Tensor:
        """Returns the queries (B, Q, d), the same for all images.

        maps: (B, d, h, w), of which only the number matters; text: (C, D), E_s; dataset: its row s
        """
        classes = self.projection(text).float()  # (C, d)
        token = self.tokens[dataset : dataset + 1]
        keys = torch.cat([classes, token])
        attended, _ = self.attention(self.initial, keys, keys, need_weights=False)
        q = self.norm(self.initial + attended)
        q = self.ffn_norm(q + self.ffn(q))  # (Q, d)
        return q.float().expand(len(maps), -1, -1)
