"""Hungarian matching of queries to segments, and sampling of points for the mask losses.

The losses at these points are in `common.mask_losses`.

Source: facebookresearch/Mask2Former:mask2former/modeling/{matcher.py,criterion.py}
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from common.segment_map import SegmentMap

# Shapes: N masks, B images, Z decoder outputs, Q queries, T segments of an image, P points.


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Samples maps (N, H, W) bilinearly at points: (N, P) float32. Maps are 0 outside.

    points: (N, P, 2), or (1, P, 2) for all maps; x, y in 0..1 of the map, so that the centre of the
            first pixel is at (0.5 / W, 0.5 / H)
    """
    maps = maps.float()
    grid = 2 * points - 1  # the corners of the map are at -1 and 1
    grid = grid.unsqueeze(1)  # (N, 1, P, 2)
    if len(points) == 1:  # maps with the same points are channels of one image
        image = maps.unsqueeze(0)
        sampled = F.grid_sample(image, grid, align_corners=False)  # (1, N, 1, P)
        return sampled[0, :, 0]
    images = maps.unsqueeze(1)
    sampled = F.grid_sample(images, grid, align_corners=False)  # (N, 1, 1, P)
    return sampled[:, 0, 0]


@torch.no_grad()
def uncertain_points(
    logits: Tensor, num: int, candidates: Tensor | None = None, random: Tensor | None = None
) -> Tensor:
    """Returns `num` points per mask, x and y in 0..1: (N, num, 2), uncertain ones first.

    int(0.75 * num) points are the `candidates` whose logits are nearest to 0. The rest is `random`.
    logits:     (N, H, W) of the masks
    candidates: (N, 3 * num, 2); by default drawn uniformly, the same for all masks
    random:     (N, num - int(0.75 * num), 2); by default drawn uniformly, for each mask
    Source: PointRend, facebookresearch/detectron2:projects/PointRend/point_rend/point_features.py
    """
    count = len(logits)
    device = logits.device
    uncertain = int(0.75 * num)
    rest = num - uncertain
    if candidates is None:
        shared = torch.rand(1, 3 * num, 2, device=device)
        candidates = shared.expand(count, -1, -1)
    if random is None:
        random = torch.rand(count, rest, 2, device=device)
    sampled = point_sample(logits, candidates)
    distance = sampled.abs()
    nearest = distance.topk(uncertain, largest=False, sorted=False)
    rows = nearest.indices.unsqueeze(2)  # (N, uncertain, 1)
    rows = rows.expand(-1, -1, 2)
    taken = candidates.gather(1, rows)
    return torch.cat([taken, random], 1)


def pairwise_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes the BCE of each pair, mean over points: logits (Q, P), targets (T, P) -> (Q, T).

    BCE(x, t) = softplus(x) - x t, hence one matrix product gives all pairs.
    """
    points = logits.shape[1]
    negative = F.softplus(logits)
    negative = negative.sum(1, keepdim=True)  # (Q, 1)
    positive = logits @ targets.T  # (Q, T)
    total = negative - positive
    return total / points


def pairwise_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes the dice loss of each pair: logits (Q, P), targets t (T, P) -> (Q, T).

    It is 1 - (2 sum s t + 1) / (sum s + sum t + 1) with s = sigmoid(logits) and sums over points.
    """
    s = logits.sigmoid()
    overlap = 2 * s @ targets.T  # (Q, T)
    predicted = s.sum(1, keepdim=True)
    total = predicted + targets.sum(1)
    return 1 - (overlap + 1) / (total + 1)


class Pairs(NamedTuple):
    """The R matched pairs of one image, of all decoder outputs, sorted by target."""

    z: Tensor  # (R,) row of the decoder output
    query: Tensor  # (R,)
    target: Tensor  # (R,)
    counts: list[int]  # T numbers: pairs of each target


def assign(costs: list[Tensor]) -> list[Pairs]:
    """Returns the cheapest one-to-one assignment in each image and decoder output (Hungarian).

    There is one wait for the device.
    costs: B tensors (Z, Q, T); infinite and NaN costs, which half precision may give, count as 1e6
    """
    finite = torch.cat(costs, -1).detach().float().nan_to_num(1e6, 1e6, 1e6)
    targets = [cost.shape[-1] for cost in costs]
    images = np.split(finite.cpu().numpy(), np.cumsum(targets)[:-1], axis=-1)
    found = [_assign_image(cost) for cost in images]
    rows = torch.from_numpy(np.concatenate(found, 1)).to(finite.device)
    parts = rows.split([pairs.shape[1] for pairs in found], 1)
    counts = [np.bincount(pairs[2], minlength=t).tolist() for pairs, t in zip(found, targets)]
    return [Pairs(*part, count) for part, count in zip(parts, counts)]


def _assign_image(cost: np.ndarray) -> np.ndarray:
    """Returns z, query and target of an image's pairs, (3, R). cost: (Z, Q, T)"""
    layers = []
    for z, layer in enumerate(cost):
        query, target = linear_sum_assignment(layer)
        layers.append(np.stack([np.full_like(query, z), query, target]))
    pairs = np.concatenate(layers, 1)
    return pairs[:, pairs[2].argsort(kind="stable")]


def sample_masks(masks: Tensor | SegmentMap, points: Tensor) -> Tensor:
    """Samples all of N masks (N, H, W) at the same points (1, P, 2), as `point_sample`: (N, P)."""
    if isinstance(masks, SegmentMap):
        return masks.sample(points[0])
    return point_sample(masks, points)


def sample_pairs(
    logits: Tensor, masks: Tensor | SegmentMap, counts: list[int], num: int
) -> tuple[Tensor, Tensor]:
    """Samples R pairs of mask logits and ground truth at `uncertain_points` of the logits.

    Returns logits (R, num), with gradient, and truth (R, num) in 0..1.
    logits: (R, h, w), sorted by mask; masks: (T, H, W) bool
    counts: T numbers, pairs of each mask. They are sampled together, without copies of the mask
    """
    if not len(logits):
        nothing = logits.flatten(1)[:, :1]
        nothing = nothing.expand(-1, num)  # (0, num)
        return nothing, nothing.detach()
    points = uncertain_points(logits.detach(), num)  # (R, num, 2)
    points_by_mask = points.split(counts[: len(masks)])
    truth = []
    for mask, own in zip(masks, points_by_mask):  # own: points of the mask's pairs
        if not len(own):
            continue
        shared = own.reshape(1, -1, 2)
        values = point_sample(mask[None], shared)
        truth.append(values.view(len(own), -1))
    sampled = point_sample(logits, points)
    return sampled, torch.cat(truth)
