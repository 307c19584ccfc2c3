"""The classifier of detectors with an open vocabulary: its weights are text embeddings."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALL = slice(None)


def places_in(columns: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Returns the places in columns (K,) of labels (R,) < num_classes; -1 for -1 and all others."""
    place = labels.new_full((num_classes + 1,), -1)  # the last one is of -1
    place.scatter_(0, columns, torch.arange(len(columns), device=columns.device))
    return place[labels]


@dataclass
class TextScores:
    """The scores of R regions for C texts. Only the rows and columns that are read are computed."""

    embedding: Tensor  # (R, D), of unit norm
    text: Tensor  # (C, D), of unit norm
    tau: float = 1.0
    bias: Tensor | None = None

    def cosine(self, rows: Tensor | slice = ALL, columns: Tensor | slice = ALL) -> Tensor:
        """Returns the cosines in [-1, 1] of some regions and texts, (R, C) if all are chosen."""
        # a cosine in bfloat16 has errors of 0.002, which 1 / tau would multiply by 50
        with torch.autocast(self.text.device.type, enabled=False):
            return self.embedding[rows] @ self.text[columns].T

    def logits(self, columns: Tensor | slice = ALL) -> Tensor:
        """Returns cosine / tau + bias of some texts, (R, C) if all are chosen."""
        logits = self.cosine(columns=columns) / self.tau
        return logits if self.bias is None else logits + self.bias

    def places(self, labels: Tensor, columns: Tensor | slice = ALL) -> Tensor:
        """Returns `places_in` of labels (R,). If columns is a slice, it is ALL."""
        if isinstance(columns, slice):
            return labels
        return places_in(columns, labels, len(self.text))


class TextClassifier(nn.Module):
    """Classifies regions by the cosine of their embedding and the text embedding of each label.

    tau:      temperature, which divides the cosine
    cls_bias: initial value of a learned bias of all logits; 0: there is no bias
    Source: facebookresearch/Detic:detic/modeling/roi_heads/zero_shot_classifier.py
    """

    def __init__(self, fc_dim: int, text_dim: int, tau: float, cls_bias: float):
        super().__init__()
        self.tau = tau
        self.embedding = nn.Linear(fc_dim, text_dim)
        self.cls_bias = nn.Parameter(torch.tensor([cls_bias])) if cls_bias else None

    def forward(self, hidden: Tensor, text: Tensor) -> TextScores:
        """Returns the scores of region features (R, fc_dim) for text (C, text_dim).

        text: one row of unit norm per label
        """
        embedding = F.normalize(self.embedding(hidden).float())  # (R, D)
        # a copy: DistributedDataParallel takes a parameter in the output for one without a gradient
        bias = None if self.cls_bias is None else self.cls_bias.clone()
        return TextScores(embedding, text, self.tau, bias)
