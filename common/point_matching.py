"""The mechanics of matching queries to segments and of losses at points; the losses themselves are the methods'.

Source: facebookresearch/Mask2Former:mask2former/modeling/{matcher.py,criterion.py}
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

# Shapes: N masks, Q queries, T segments of an image, P points.


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Values (N, P) float32 of maps (N, H, W) at points (N, P, 2), or (1, P, 2) for all maps: bilinear, 0 outside.

    points: x, y in 0..1 of the map, whose pixels are squares: the first one's centre is at (0.5 / W, 0.5 / H)
    """
    maps, shared = (
        maps.float(),
        len(points) == 1,
    )  # maps with the same points are channels of one image
    grid = (2 * points - 1)[:, None]  # (N, 1, P, 2)
    sampled = F.grid_sample(maps[None] if shared else maps[:, None], grid, align_corners=False)
    return sampled[0, :, 0] if shared else sampled[:, 0, 0]


@torch.no_grad()
def uncertain_points(
    logits: Tensor, num: int, candidates: Tensor | None = None, random: Tensor | None = None
) -> Tensor:
    """Points (N, num, 2), x and y in 0..1, where the masks of logits (N, H, W) are least certain; a quarter anywhere.

    candidates: (N, 3 * num, 2), of which int(0.75 * num) are taken; default: uniform draws, the same for all masks
    random: (N, the rest, 2); default: uniform draws
    Source: PointRend, facebookresearch/detectron2:projects/PointRend/point_rend/point_features.py
    """
    sure = int(0.75 * num)
    if candidates is None:
        candidates = torch.rand(1, 3 * num, 2, device=logits.device).expand(len(logits), -1, -1)
    if random is None:
        random = torch.rand(len(logits), num - sure, 2, device=logits.device)
    rows = (
        point_sample(logits, candidates).abs().topk(sure, largest=False, sorted=False).indices
    )  # (N, sure)
    return torch.cat([candidates.gather(1, rows[..., None].expand(-1, -1, 2)), random], 1)


def pairwise_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the points of BCE(logits (Q, P), targets (T, P)) for each pair -> (Q, T).

    With BCE(x, t) = softplus(x) - x t, it is one matrix product.
    """
    return (F.softplus(logits).sum(1, keepdim=True) - logits @ targets.T) / logits.shape[1]


def pairwise_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2 s.t + 1) / (sum s + sum t + 1) of each pair -> (Q, T); s: sigmoid of logits (Q, P), t: targets (T, P)."""
    s = logits.sigmoid()
    return 1 - (2 * s @ targets.T + 1) / (s.sum(1, keepdim=True) + targets.sum(1) + 1)


def hungarian(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest one-to-one assignment of cost (Q, T): rows (n,), ascending, and their columns (n,), n = min(Q, T).

    Costs that are not finite, as half precision may make them, count as large.
    """
    finite = cost.detach().float().nan_to_num(1e6, 1e6, 1e6).cpu()
    rows, columns = linear_sum_assignment(finite)
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)


def assign_by_depth(cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`hungarian` in each depth of cost (Z, Q, T) -> depth, query, target (R,) of all pairs, sorted by target."""
    found = [
        hungarian(of_depth) for of_depth in cost.cpu()
    ]  # one copy from the device for all depths
    depth = torch.repeat_interleave(
        torch.arange(len(found)), torch.tensor([len(rows) for rows, _ in found])
    )
    query, target = (torch.cat(part) for part in zip(*found))
    order = target.argsort(stable=True)
    return tuple(part[order].to(cost.device) for part in (depth, query, target))


def sample_pairs(logits: Tensor, masks: Tensor, target: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Mask logits (R, h, w) and what they should be, masks (T, H, W) bool [target] -> both at `num` points, (R, num).

    target: (R,) in rising order, so that no mask is copied for each of its pairs. The points are those where the logits
    are least certain (`uncertain_points`); the logits keep their gradient.
    """
    if not len(logits):
        nothing = logits.flatten(1)[:, :1].expand(-1, num)  # (0, num)
        return nothing, nothing.detach()
    points = uncertain_points(logits.detach(), num)  # (R, num, 2)
    counts = target.bincount(minlength=len(masks)).tolist()
    truth = [
        point_sample(mask[None], own.reshape(1, -1, 2)).view(len(own), -1)
        for mask, own in zip(masks, points.split(counts))
        if len(own)
    ]
    return point_sample(logits, points), torch.cat(truth)
