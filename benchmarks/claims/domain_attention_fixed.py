"""Domain attention with gates that are the same for all images: a control of those that it chooses.

    python -m benchmarks.claims.domain_attention_fixed --datasets coco,o365,oid --tiny

The flags are those of domain_attention.py. --adapters decides nothing.
"""

import math

import torch
from torch import Tensor, nn

import domain_attention
from common.command import run_command

Args, METHOD = domain_attention.Args, domain_attention.METHOD
MODEL_FIELDS = domain_attention.MODEL_FIELDS
TINY = domain_attention.TINY


class FixedGates(nn.Module):
    """Multiplies each channel of a map by a gate, which is trained and starts as 0.9."""

    def __init__(self, channels: int, adapters: int, start: nn.Module | None = None):
        super().__init__()
        self.logits = nn.Parameter(torch.full((channels,), math.log(9)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logits.sigmoid()[:, None, None]


def main() -> None:
    """Runs domain_attention.py with these gates."""
    domain_attention.DomainAttention = FixedGates
    domain_attention.main()


if __name__ == "__main__":
    run_command(main)
