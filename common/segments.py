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
    height, width = size
    batch = mask_logits[None].float()
    full = F.interpolate(batch, padded, mode="bilinear", align_corners=False)
    cropped = full[..., :height, :width]
    restored = F.interpolate(cropped, original, mode="bilinear", align_corners=False)
    return restored[0]


def semantic_map(probabilities: Tensor, mask_logits: Tensor) -> Tensor:
    """Returns class scores (K, H, W): the sum over queries of class probability times mask.

    probabilities: (Q, K); mask_logits: (Q, H, W), of which the sigmoid is taken
    """
    masks = mask_logits.float().sigmoid()
    return torch.einsum("qk,qhw->khw", probabilities.float(), masks)


def semantic_labels(probabilities: Tensor, mask_logits: Tensor) -> Tensor:
    """Returns the best class of `semantic_map` at each pixel, (H, W) int16.

    It works in strips of rows, since scores of 150 classes are larger than all the masks.
    """
    width = mask_logits.shape[2]
    scores_per_row = max(probabilities.shape) * width
    rows = max(1, STRIP // scores_per_row)
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
    no_object = probabilities.shape[1] - 1
    kept = (labels < no_object) & (scores > object_threshold)
    scores = scores[kept]
    labels = labels[kept]
    size = mask_logits.shape[1:]
    panoptic = torch.zeros(size, dtype=torch.int32, device=mask_logits.device)
    if not len(scores):
        return panoptic, []
    masks = mask_logits[kept].float().sigmoid_()  # of a copy
    winner = (scores[:, None, None] * masks).argmax(0)  # (H, W)
    segments = []
    stuff = {}  # label -> its only segment
    queries = zip(scores.tolist(), labels.tolist())
    for row, (score, label) in enumerate(queries):
        won = winner == row
        mask = masks[row] >= 0.5
        region = won & mask if intersect else won
        if not region.any() or not mask.any():
            continue
        share = won.sum() / mask.sum()
        if share < overlap_threshold:
            continue
        segment = stuff.get(label)
        if segment is None:
            number = len(segments) + 1
            thing = bool(is_thing[label])
            segment = {"id": number, "label": label, "isthing": thing, "score": score}
            segments.append(segment)
            if not thing:
                stuff[label] = segment
        segment["score"] = max(score, segment["score"])
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
    classes = probabilities.shape[1]
    count = min(top_k, probabilities.numel())
    scores, pairs = probabilities.flatten().topk(count)
    queries = pairs // classes
    labels = pairs % classes
    if things is not None:
        things = things.to(labels.device)
        kept = things[labels]
        scores = scores[kept]
        queries = queries[kept]
        labels = labels[kept]
    masks = mask_logits > 0  # (Q, H, W)
    quality = []
    for logits, mask in zip(mask_logits.float(), masks):
        inside = logits.sigmoid() * mask
        area = mask.sum() + 1e-6
        quality.append(inside.sum() / area)
    quality = torch.stack(quality)  # (Q,)
    scores = scores * quality[queries]
    scores, order = scores.sort(descending=True)
    masks = masks[queries[order]]
    boxes = mask_boxes(masks)
    return {"boxes": boxes, "labels": labels[order], "scores": scores, "masks": masks}


def mask_boxes(masks: Tensor) -> Tensor:
    """Returns the tight boxes (N, 4) xyxy, float32, of masks (N, H, W). An empty mask has zeros."""
    edges = []
    for side in (masks.any(1), masks.any(2)):  # (N, W), (N, H)
        first = side.byte().argmax(1)
        behind = side.flip(1).byte().argmax(1)
        last = side.shape[1] - behind
        last = last * side.any(1)  # 0 for an empty mask
        edges.append((first, last))
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
    ids = [0]  # row -1
    labels = []
    scores = []
    for segment in info:
        ids.append(segment["id"])
        labels.append(segment["label"])
        scores.append(float(segment["score"]))
    largest = max(int(panoptic.max()), *ids)
    row_of = torch.full((largest + 1,), -2)  # -2: unknown id
    row_of[ids] = torch.arange(-1, len(info))
    segments = row_of[panoptic]
    unknown = panoptic[segments == -2]
    if len(unknown):
        first = int(unknown[0])
        raise ValueError(f"segment {first} of the map is not in segments_info")
    labels = torch.tensor(labels, dtype=torch.long)
    return {"segments": segments, "labels": labels, "scores": torch.tensor(scores)}
