"""Hungarian matching of queries to segments, and sampling of points for the mask losses.

The losses at these points are in `common.mask_losses`.

Source: facebookresearch/Mask2Former:mask2former/modeling/{matcher.py,criterion.py}
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

# Shapes: N masks, Q queries, T segments of an image, P points.


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


def hungarian(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (rows, columns) of the cheapest one-to-one assignment, (min(Q, T),) each.

    Rows ascend. columns[i] is assigned to rows[i].
    cost: (Q, T); infinite and NaN costs, which half precision may give, count as 1e6
    """
    finite = cost.detach().float().nan_to_num(1e6, 1e6, 1e6)
    rows, columns = linear_sum_assignment(finite.cpu())
    rows = torch.as_tensor(rows, device=cost.device)
    columns = torch.as_tensor(columns, device=cost.device)
    return rows, columns


def assign_by_depth(cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `hungarian` for each of Z decoder outputs. Returns (depth, query, target), (R,) each.

    R counts the pairs of all outputs, which are sorted by target. depth is the row of the output.
    cost: (Z, Q, T)
    """
    depths = []
    queries = []
    targets = []
    layers = cost.cpu()  # one copy from the device for all
    for depth, layer in enumerate(layers):
        rows, columns = hungarian(layer)
        depths.append(torch.full_like(rows, depth))
        queries.append(rows)
        targets.append(columns)
    depth = torch.cat(depths)
    query = torch.cat(queries)
    target = torch.cat(targets)
    order = target.argsort(stable=True)
    pairs = torch.stack([depth, query, target])
    pairs = pairs[:, order].to(cost.device)
    return tuple(pairs)


def sample_pairs(logits: Tensor, masks: Tensor, target: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Samples R pairs of mask logits and ground truth at `uncertain_points` of the logits.

    Returns logits (R, num), with gradient, and truth (R, num) in 0..1.
    logits: (R, h, w); masks: (T, H, W) bool
    target: (R,), the row in `masks` of each pair. It must be ascending: the pairs of one mask are
            sampled together, without a copy of the mask for each.
    """
    if not len(logits):
        nothing = logits.flatten(1)[:, :1]
        nothing = nothing.expand(-1, num)  # (0, num)
        return nothing, nothing.detach()
    points = uncertain_points(logits.detach(), num)  # (R, num, 2)
    counts = target.bincount(minlength=len(masks))
    points_by_mask = points.split(counts.tolist())
    truth = []
    for mask, own in zip(masks, points_by_mask):  # own: points of the mask's pairs
        if not len(own):
            continue
        shared = own.reshape(1, -1, 2)
        values = point_sample(mask[None], shared)
        truth.append(values.view(len(own), -1))
    sampled = point_sample(logits, points)
    return sampled, torch.cat(truth)
