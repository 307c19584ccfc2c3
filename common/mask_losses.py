"""Mask2Former's output, its mask losses at points, and the matching cost, made of the same terms.

Source: facebookresearch/Mask2Former:mask2former/modeling/{matcher.py,criterion.py}.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.compiling import compilable
from common.distributed import mean_over_ranks
from common.point_matching import pairwise_bce, pairwise_dice, point_sample, sample_masks
from common.segment_map import SegmentMap
from common.targets import Targets

# Shapes: Z predictions, Q queries, N masks of an image, R matched pairs, P points, C channels.


@dataclass
class MaskOutput:
    """Holds Mask2Former's predictions; mask logits are `mask_embed` times `mask_features`."""

    logits: Tensor  # (Z, B, Q, K + 1), the last column is background
    mask_embed: Tensor  # (Z, B, Q, C)
    mask_features: Tensor  # (B, C, h, w)

    def masks(self, z: Tensor | int, image: int, query: Tensor | slice = slice(None)) -> Tensor:
        """Returns the mask logits (R, h, w) of R queries of one image.

        z:     index of the prediction, or (R,) int64 with an index per query
        image: row of the image in the batch
        query: (R,) int64, rows of the queries, or a slice; by default all queries
        """
        embed = self.mask_embed[z, image, query]  # (R, C)
        return torch.einsum("rc,chw->rhw", embed, self.mask_features[image])


def masks_per_rank(targets: list[Targets], device: torch.device) -> Tensor:
    """Returns the number of ground truths in all targets, mean over the ranks and at least 1.

    A ground truth is a mask or, in a dataset of boxes, a box. The result is a scalar tensor.
    """
    num_masks = torch.full((), float(sum(len(t.labels) for t in targets)), device=device)
    return mean_over_ranks(num_masks).clamp(min=1)


def mask_cost(
    mask_embed: Tensor, mask_features: Tensor, masks: Tensor | SegmentMap, num_points: int
) -> Tensor:
    """Returns the matching cost 5 BCE + 5 dice of each query and each mask of one image: (Z, Q, N).

    BCE and dice are computed at `num_points` random points, which all queries and predictions
    share. The mask logits are the product of mask_embed (Z, Q, C) and mask_features (C, h, w).
    masks: (N, H, W)
    """
    points = torch.rand(1, num_points, 2, device=mask_embed.device)
    # sampling is linear: sampled features give the logits at the points, without a whole mask
    logits = mask_embed @ point_sample(mask_features, points)  # (Z, Q, P)
    truth = sample_masks(masks, points)  # (N, P)
    return torch.stack([5 * pairwise_bce(x, truth) + 5 * pairwise_dice(x, truth) for x in logits])


@compilable
def loss_mask(logits: Tensor, truth: Tensor, num_masks: Tensor) -> Tensor:
    """1/num_masks sum_r 1/P sum_p BCE(sigmoid(x_rp), t_rp): BCE at P points of R matched pairs.

    x is `logits` and t is `truth`, both (R, P). num_masks: the scalar of `masks_per_rank`.
    """
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return bce.mean(1).sum() / num_masks


@compilable
def loss_dice(logits: Tensor, truth: Tensor, num_masks: Tensor) -> Tensor:
    """1/num_masks sum_r (1 - (2 sum_p s t + 1) / (sum_p s + sum_p t + 1)), with s = sigmoid(x).

    x is `logits` and t is `truth`, both (R, P). num_masks: the scalar of `masks_per_rank`.
    """
    s = logits.sigmoid()
    dice = (2 * (s * truth).sum(1) + 1) / (s.sum(1) + truth.sum(1) + 1)
    return (1 - dice).sum() / num_masks
