"""Postprocessing of queries to label maps, panoptic maps and instances.

Each of Q queries has probabilities of K classes, and mask logits.
Source: facebookresearch/Mask2Former:mask2former/maskformer_model.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

STRIP = 2**24  # class scores of a strip of `semantic_labels`, 64 MiB


def restore(
    mask_logits: Tensor, padded: tuple[int, int], size: tuple[int, int], original: tuple[int, int]
) -> Tensor:
    """Resizes the mask logits of a padded input to the image in its file.

    mask_logits: (Q, h, w); padded, size, original: (height, width) of the input with its padding,
    of the input without it, and of the file

    Returns (Q, height, width) float32. This is the first step of every task, also where Mask2Former
    resizes the class scores instead (semantic segmentation).
    """
    full = F.interpolate(mask_logits[None].float(), padded, mode="bilinear", align_corners=False)
    cropped = full[..., : size[0], : size[1]]
    return F.interpolate(cropped, original, mode="bilinear", align_corners=False)[0]


def semantic_map(probabilities: Tensor, mask_logits: Tensor) -> Tensor:
    """Returns class scores (K, H, W): the sum over queries of class probability times mask.

    probabilities: (Q, K); mask_logits: (Q, H, W), of which the sigmoid is taken
    """
    return torch.einsum("qk,qhw->khw", probabilities.float(), mask_logits.float().sigmoid())


def semantic_labels(probabilities: Tensor, mask_logits: Tensor) -> Tensor:
    """Returns the best class of `semantic_map` at each pixel, (H, W) int16.

    It works in strips of rows, since scores of 150 classes are larger than all the masks.
    """
    rows = max(1, STRIP // (max(probabilities.shape) * mask_logits.shape[2]))
    strips = []
    for strip in mask_logits.split(rows, 1):
        scores = semantic_map(probabilities, strip)
        strips.append(scores.argmax(0).short())
    return torch.cat(strips)


def panoptic_map(
    probabilities: Tensor,
    mask_logits: Tensor,
    is_thing: Sequence[bool],
    object_threshold: float,
    overlap_threshold: float,
    intersect: bool,
) -> tuple[Tensor, list[dict]]:
    """Returns a panoptic map (H, W) int32, and its segments.

    probabilities:     (Q, K + 1), the last column is "no object"
    mask_logits:       (Q, H, W)
    is_thing:          K bools; all segments of a stuff class are merged
    object_threshold:  queries whose best class is not more probable are dropped
    overlap_threshold: queries that win less than this share of their mask are dropped
    intersect:         True: a segment is the part of its mask (probability >= 0.5) that the query
                       wins (Mask2Former). False: it is all pixels that the query wins (MaskFormer).

    A pixel is won by the query with the highest class probability times mask probability. Segments
    are dicts of `id` (1..n; 0 in the map is no segment), `label`, `isthing` and `score`.
    """
    scores, labels = probabilities.max(1)
    kept = (labels < probabilities.shape[1] - 1) & (scores > object_threshold)
    kept = kept.nonzero().flatten()
    panoptic = torch.zeros(mask_logits.shape[1:], dtype=torch.int32, device=mask_logits.device)
    if not len(kept):
        return panoptic, []
    masks = mask_logits[kept].float().sigmoid_()  # of a copy
    winner = (scores[kept, None, None] * masks).argmax(0)  # (H, W)
    segments = []
    stuff = {}  # label -> its only segment
    for row, (score, label) in enumerate(zip(scores[kept].tolist(), labels[kept].tolist())):
        won = winner == row
        mask = masks[row] >= 0.5
        region = won & mask if intersect else won
        if not (region.any() and mask.any()) or won.sum() / mask.sum() < overlap_threshold:
            continue
        segment = stuff.get(label)
        if segment is None:
            thing = bool(is_thing[label])
            segment = {"id": len(segments) + 1, "label": label, "isthing": thing}
            segments.append(segment)
            if not thing:
                stuff[label] = segment
        segment["score"] = max(score, segment.get("score", 0))
        panoptic[region] = segment["id"]
    return panoptic, segments


def instances(
    probabilities: Tensor, mask_logits: Tensor, top_k: int = 100, things: Tensor | None = None
) -> dict:
    """Returns the N <= top_k best instances: `boxes` (N, 4) xyxy, `labels`, `scores`, `masks`.

    The top_k pairs of a query and a class are chosen by class probability (Q, K), so that a query
    may give several instances. Scores (N,) are the class probability times the mean mask
    probability inside the mask, falling. Masks are (N, H, W) bool.

    things: (K,) bool; instances of other classes are dropped after the choice
    """
    scores, pairs = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    queries = pairs // probabilities.shape[1]
    labels = pairs % probabilities.shape[1]
    if things is not None:
        kept = things.to(labels.device)[labels]
        scores, queries, labels = scores[kept], queries[kept], labels[kept]
    masks = mask_logits > 0  # (Q, H, W)
    quality = []
    for logits, mask in zip(mask_logits.float(), masks):
        quality.append((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6))
    scores, order = (scores * torch.stack(quality)[queries]).sort(descending=True)
    masks = masks[queries[order]]
    return {"boxes": mask_boxes(masks), "labels": labels[order], "scores": scores, "masks": masks}


def mask_boxes(masks: Tensor) -> Tensor:
    """Returns the tight boxes (N, 4) xyxy, float32, of masks (N, H, W). An empty mask has zeros."""
    edges = []
    for side in (masks.any(1), masks.any(2)):  # (N, W), (N, H)
        first = side.byte().argmax(1)
        last = side.shape[1] - side.flip(1).byte().argmax(1)
        edges.append((first, last * side.any(1)))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], 1).float()


def segment_rows(found: dict) -> dict:
    """Converts a prediction's `panoptic` map, or `semantic` map if it has no other, to segments.

    Returns `segments` (H, W) int64, the row of `labels` (N,) at each pixel, or -1 for none. For a
    panoptic map also `scores` (N,). Raises ValueError if an id in the map is not in segments_info.
    """
    if "panoptic" not in found:
        labels, segments = found["semantic"].cpu().long().unique(return_inverse=True)
        return {"segments": segments, "labels": labels}
    panoptic = found["panoptic"].cpu().long()
    info = found["segments_info"]
    ids = [0, *(segment["id"] for segment in info)]
    row_of = torch.full((max(int(panoptic.max()), *ids) + 1,), -2)  # -2: unknown id
    row_of[ids] = torch.arange(-1, len(info))
    segments = row_of[panoptic]
    unknown = panoptic[segments == -2]
    if len(unknown):
        raise ValueError(f"segment {int(unknown[0])} of the map is not in segments_info")
    return {
        "segments": segments,
        "labels": torch.tensor([segment["label"] for segment in info], dtype=torch.long),
        "scores": torch.tensor([float(segment["score"]) for segment in info]),
    }
