"""The classifier of detectors with an open vocabulary: its weights are text embeddings."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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

    def forward(self, hidden: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosine (R, C) in [-1, 1] and logits (R, C) = cosine / tau + cls_bias.

        hidden: (R, fc_dim), region features; text: (C, text_dim), one row of unit norm per label
        """
        embedded = F.normalize(self.embedding(hidden).float())  # (R, D)
        # a cosine in bfloat16 has errors of 0.002, which 1 / tau would multiply by 50
        with torch.autocast(hidden.device.type, enabled=False):
            cosine = embedded @ text.T  # (R, C)
        logits = cosine / self.tau  # (R, C)
        if self.cls_bias is not None:
            logits = logits + self.cls_bias
        return cosine, logits
