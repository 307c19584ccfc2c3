"""From a set of queries, each with class probabilities and mask logits, to label maps, panoptic maps and instances.

Q queries, K classes; masks are logits (Q, H, W). Nothing here knows a model.
Source: facebookresearch/Mask2Former:mask2former/maskformer_model.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

STRIP = 2**24  # numbers of a map of class scores that exist at once, 64 MiB


def restore(
    mask_logits: Tensor, padded: tuple[int, int], size: tuple[int, int], original: tuple[int, int]
) -> Tensor:
    """(Q, h, w) logits of a padded input -> (Q, height, width) float32 logits of the image as it was in the file.

    padded, size, original: (height, width) of the input with and without its padding, and of the file

    It comes first for every task; where only classes are asked for, Mask2Former resizes their sums instead.
    """
    full = F.interpolate(mask_logits[None].float(), padded, mode="bilinear", align_corners=False)
    true = full[..., : size[0], : size[1]]
    return F.interpolate(true, original, mode="bilinear", align_corners=False)[0]


def semantic_map(probabilities: Tensor, mask_logits: Tensor) -> Tensor:
    """(K, H, W) scores of the classes: over all queries, the sum of class probability (Q, K) times sigmoid mask."""
    return torch.einsum("qk,qhw->khw", probabilities.float(), mask_logits.float().sigmoid())


def semantic_labels(probabilities: Tensor, mask_logits: Tensor) -> Tensor:
    """(H, W) int16: the best class of `semantic_map`, which with 150 classes would be larger than all the masks."""
    rows = max(1, STRIP // (max(probabilities.shape) * mask_logits.shape[2]))
    strips = [
        semantic_map(probabilities, strip).argmax(0).short()
        for strip in mask_logits.split(rows, dim=1)
    ]
    return torch.cat(strips)


def panoptic_map(
    probabilities: Tensor,
    mask_logits: Tensor,
    is_thing: Sequence[bool],
    object_threshold: float,
    overlap_threshold: float,
    intersect: bool,
) -> tuple[Tensor, list[dict]]:
    """(H, W) int32 and what its numbers 1..n mean: dicts of `id`, `label`, `isthing`, `score`; 0 is no segment.

    probabilities:     (Q, K + 1), the last column is that of no object
    is_thing:          K bools; the segments of a class of stuff are one
    object_threshold:  the best class must be more probable
    overlap_threshold: the least share of its mask (probability >= 0.5) that a query must win against the others
    intersect:         a segment is what the query won of its mask (Mask2Former), else all that it won (MaskFormer:
                       hardly a pixel is without segment)
    """
    scores, labels = probabilities.max(dim=1)
    kept = ((labels < probabilities.shape[1] - 1) & (scores > object_threshold)).nonzero().flatten()
    panoptic = torch.zeros(mask_logits.shape[1:], dtype=torch.int32, device=mask_logits.device)
    if not len(kept):
        return panoptic, []
    masks = mask_logits[kept].float().sigmoid_()  # of a copy
    winner = (scores[kept, None, None] * masks).argmax(dim=0)  # (H, W)
    segments, stuff = [], {}
    for row, (score, label) in enumerate(zip(scores[kept].tolist(), labels[kept].tolist())):
        won, mask = winner == row, masks[row] >= 0.5
        region = won & mask if intersect else won
        if not (region.any() and mask.any()) or won.sum() / mask.sum() < overlap_threshold:
            continue
        segment = stuff.get(label)
        if segment is None:
            segments.append(
                segment := {
                    "id": len(segments) + 1,
                    "label": label,
                    "isthing": bool(is_thing[label]),
                }
            )
            if not segment["isthing"]:
                stuff[label] = segment
        segment["score"] = max(score, segment.get("score", 0))
        panoptic[region] = segment["id"]
    return panoptic, segments


def instances(
    probabilities: Tensor, mask_logits: Tensor, top_k: int = 100, things: Tensor | None = None
) -> dict:
    """`boxes` (N, 4) xyxy, `labels` (N,), `scores` (N,) falling, `masks` (N, H, W) bool: the N <= top_k best instances.

    The best of all pairs of a query and a class, by probability (Q, K); one query may be several instances. The score
    is the probability of the class times the mean probability within the mask.

    things: (K,) bool, the classes that are left after the choice
    """
    scores, pairs = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    queries, labels = pairs // probabilities.shape[1], pairs % probabilities.shape[1]
    if things is not None:
        kept = things.to(labels.device)[labels]
        scores, queries, labels = scores[kept], queries[kept], labels[kept]
    masks = mask_logits > 0  # (Q, H, W)
    sureness = [
        (x.sigmoid() * m).sum() / (m.sum() + 1e-6) for x, m in zip(mask_logits.float(), masks)
    ]
    scores, order = (scores * torch.stack(sureness)[queries]).sort(descending=True)
    masks = masks[queries[order]]
    return {"boxes": mask_boxes(masks), "labels": labels[order], "scores": scores, "masks": masks}


def mask_boxes(masks: Tensor) -> Tensor:
    """(N, H, W) bool -> (N, 4) float32 xyxy, tight around the pixels; zeros for an empty mask."""
    edges = []
    for side in (masks.any(dim=1), masks.any(dim=2)):  # (N, W), (N, H)
        first, last = side.byte().argmax(dim=1), side.flip(1).byte().argmax(dim=1)
        edges.append((first, (side.shape[1] - last) * side.any(dim=1)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1).float()


def segment_rows(found: dict) -> dict:
    """The `panoptic` map of a prediction, else its `semantic` one, as a Sample has it.

    `segments` (H, W) int64, the row of `labels` (N,) at each pixel, -1: none; of a panoptic map also `scores` (N,).
    Raises ValueError for a number in the map that is not in segments_info.
    """
    if "panoptic" not in found:
        labels, segments = found["semantic"].cpu().long().unique(return_inverse=True)
        return {"segments": segments, "labels": labels}
    panoptic, info = found["panoptic"].cpu().long(), found["segments_info"]
    row_of = torch.full((max([0, int(panoptic.max()), *(s["id"] for s in info)]) + 1,), -2)
    row_of[[0, *(s["id"] for s in info)]] = torch.arange(-1, len(info))
    segments = row_of[panoptic]
    if (segments == -2).any():
        raise ValueError(
            f"segment {int(panoptic[segments == -2][0])} of the map is not in segments_info"
        )
    labels = torch.tensor([s["label"] for s in info], dtype=torch.long)
    return {
        "segments": segments,
        "labels": labels,
        "scores": torch.tensor([float(s["score"]) for s in info]),
    }
