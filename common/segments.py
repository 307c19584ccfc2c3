"""Postprocessing of queries to label maps, panoptic maps and instances.

Each of Q queries has probabilities of K classes, and mask logits.
Source: facebookresearch/Mask2Former:mask2former/maskformer_model.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from common.masks import encode_masks

TASKS = {  # what a segmenter predicts for a dataset, by its supervision
    "semantic": "semantic",
    "panoptic": "panoptic, things",
    "instances": "instance",
    "boxes": "instance",
}
# mask logits that are made at once on a CPU: 2 MiB, so that they stay in its caches
IN_CACHE = 2**19
AT_ONCE = 2**27  # on other devices: 512 MiB
MASKS = 2**30  # pixels of all instance masks of an image, a byte each


@lru_cache(maxsize=64)
def resize_matrix(old: int, padded: int, size: int, new: int) -> Tensor:
    """Returns the matrix (new, old) that resizes `old` cells to `padded`, cuts, and resizes again.

    Both are bilinear. size: what is left of `padded`, which becomes `new`
    """

    def resize(identity: Tensor, length: int) -> Tensor:
        return F.interpolate(identity[None], length, mode="linear", align_corners=False)[0].T

    first = resize(torch.eye(old), padded)  # (padded, old)
    return resize(torch.eye(size), new) @ first[:size]


@dataclass(frozen=True)
class FullMasks:
    """The mask logits (Q, H, W) of the image in its file, of which only some rows are in memory.

    The maps of the network are resized bilinearly to its input, the padding is cut, and the rest is
    resized to the file: two products of matrices, of rows and of columns.

    logits: (Q, h, w), of the network
    padded, size, original: (height, width) of the input with its padding, of the input without it,
            and of the file
    union:  (Q,), ascending: which of the U unions, 0..U-1 without gaps, a mask belongs to. A union
            has the highest logit of its masks. None: there are none
    """

    logits: Tensor
    padded: tuple[int, int]
    size: tuple[int, int]
    original: tuple[int, int]
    union: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Q, H, W), before the unions."""
        return (len(self.logits), *self.original)

    def __getitem__(self, chosen: Tensor) -> "FullMasks":
        """Returns some of the masks. chosen: (Q,) or (U,) bool, or rows if there are no unions."""
        if self.union is None:
            return replace(self, logits=self.logits[chosen])
        rows = chosen[self.union]
        union = chosen.cumsum(0) - 1
        return replace(self, logits=self.logits[rows], union=union[self.union[rows]])

    def united(self, union: Tensor) -> "FullMasks":
        """Returns the unions of the Q masks: the highest logit at each pixel. union: (Q,)"""
        union, order = union.sort(stable=True)
        return replace(self, logits=self.logits[order], union=union)

    def strips(self) -> Iterator[Tensor]:
        """Yields the logits in float32 strips (Q, rows, W), or (U, rows, W), from top to bottom."""
        logits = self.logits.float()
        sizes = zip(logits.shape[1:], self.padded, self.size, self.original)
        rows, columns = (resize_matrix(*lengths).to(logits) for lengths in sizes)
        limit = IN_CACHE if logits.device.type == "cpu" else AT_ONCE
        pixels = len(logits) * self.original[1]  # of a row of the file
        members = None if self.union is None else self.union.bincount().tolist()
        for part in rows.split(max(1, limit // max(1, pixels))):
            strip = part @ logits @ columns.T
            if members:
                parts = strip.split(members)
                strip = torch.cat([x if len(x) == 1 else x.amax(0, keepdim=True) for x in parts])
            yield strip

    def best_labels(self, probabilities: Tensor) -> Tensor:
        """Returns the class of the best mask at each pixel, (H, W) int16; 0 if there is none.

        Each mask stands for its most probable class alone: with its probability times the mask's.
        The last column of probabilities (Q, K + 1) is no class.
        """
        scores, labels = probabilities.max(1)
        kept = labels < probabilities.shape[1] - 1
        if not kept.any():
            return labels.new_zeros(self.original, dtype=torch.int16)
        scores = scores[kept, None, None]
        labels = labels[kept]
        strips = self[kept].strips()
        best = (labels[(scores * masks.sigmoid()).max(0).indices] for masks in strips)
        return _joined(best, self.original, labels.device)


def strips_of(masks: Tensor | FullMasks) -> Iterable[Tensor]:
    """Returns the strips (Q, rows, W) of masks; a tensor is one strip."""
    return [masks] if isinstance(masks, Tensor) else masks.strips()


def semantic_map(probabilities: Tensor, mask_logits: Tensor) -> Tensor:
    """Returns class scores (K, H, W): the sum over queries of class probability times mask.

    probabilities: (Q, K); mask_logits: (Q, H, W), of which the sigmoid is taken
    """
    masks = mask_logits.float().sigmoid()
    return torch.einsum("qk,qhw->khw", probabilities.float(), masks)


def semantic_labels(
    probabilities: Tensor, mask_logits: Tensor | FullMasks, resize_scores: bool = False
) -> Tensor:
    """Returns the best class of `semantic_map` at each pixel, (H, W) int16.

    resize_scores: the scores are those of the network's input and are resized to the image, as
                   Mask2Former does for models of semantic segmentation alone. It needs FullMasks.
    """
    strips = (semantic_map(probabilities, masks) for masks in strips_of(mask_logits))
    if resize_scores:
        size = mask_logits.size
        of_input = replace(mask_logits, original=size)
        scores = torch.cat([semantic_map(probabilities, masks) for masks in of_input.strips()], 1)
        strips = FullMasks(scores, size, size, mask_logits.original).strips()
    # three times as fast as argmax on a CPU
    best = (scores.max(0).indices for scores in strips)
    return _joined(best, mask_logits.shape[1:], probabilities.device)


def _joined(strips: Iterable[Tensor], size: tuple[int, int], device: torch.device) -> Tensor:
    """Returns strips (rows, W) as one map of `size`, int16."""
    # one tensor for all: small ones between the strips would keep their memory from the system
    whole = torch.empty(size, dtype=torch.int16, device=device)
    top = 0
    for strip in strips:
        bottom = top + len(strip)
        whole[top:bottom] = strip
        top = bottom
    return whole


def panoptic_map(
    probabilities: Tensor,
    mask_logits: Tensor | FullMasks,
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
    panoptic = torch.zeros(size, dtype=torch.int32, device=probabilities.device)
    if not len(scores):
        return panoptic, []
    winner, counts = _winners(scores, mask_logits[kept], intersect)
    won, mask_area, region_area = counts
    share = won / mask_area
    dropped = (share < overlap_threshold) | (region_area == 0) | (mask_area == 0)
    id_of = torch.zeros(len(scores) + 1, dtype=torch.int32)  # of each query; the last: of none
    segments = []
    stuff = {}  # label -> its only segment
    queries = zip(scores.tolist(), labels.tolist(), dropped.tolist())
    for row, (score, label, is_dropped) in enumerate(queries):
        if is_dropped:
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
        id_of[row] = segment["id"]
    id_of = id_of.to(panoptic.device)
    for rows, won_by in zip(panoptic.split(256), winner.split(256)):
        rows.copy_(id_of[won_by.int()])
    return panoptic, segments


def _winners(
    scores: Tensor, mask_logits: Tensor | FullMasks, intersect: bool
) -> tuple[Tensor, Tensor]:
    """Returns the query (H, W) int16 that gets each pixel, N for none, and pixels counted (3, N).

    They are counted for each of the N queries: those that it wins, those of its mask, those that it
    gets.
    """
    num = len(scores)
    counts = torch.zeros(3, num, dtype=torch.long, device=scores.device)

    def winners() -> Iterator[Tensor]:
        for strip in strips_of(mask_logits):
            masks = strip.float().sigmoid()
            winner = (scores[:, None, None] * masks).max(0).indices  # (rows, W)
            inside = masks >= 0.5
            counts[0] += winner.flatten().bincount(minlength=num)
            counts[1] += inside.sum((1, 2))
            if intersect:
                is_inside = inside.gather(0, winner[None])[0]
                winner = winner.where(is_inside, num)
            counts[2] += winner.flatten().bincount(minlength=num + 1)[:num]
            yield winner

    return _joined(winners(), mask_logits.shape[1:], scores.device), counts


def instances(
    probabilities: Tensor,
    mask_logits: Tensor | FullMasks,
    top_k: int = 100,
    things: Sequence[bool] | None = None,
    names: Sequence[str] = (),
) -> dict:
    """Returns the N <= top_k best instances: `boxes` (N, 4) xyxy, `labels`, `scores`, `masks`.

    The top_k pairs of a query and a class are chosen by class probability (Q, K), so that a query
    may give several instances. Scores (N,) are the class probability times the mean mask
    probability inside the mask, falling. Masks are (N, H, W) bool. If they would take more than a
    gigabyte, there are `segmentations` instead, N RLEs.

    things: K bools; instances of other classes are dropped after the choice
    names:  K class names, of which the result has N `class_names`; none by default
    """
    classes = probabilities.shape[1]
    count = min(top_k, probabilities.numel())
    scores, pairs = probabilities.flatten().topk(count)
    queries = pairs // classes
    labels = pairs % classes
    if things is not None:
        things = torch.as_tensor(things, device=labels.device)
        kept = things[labels]
        scores = scores[kept]
        queries = queries[kept]
        labels = labels[kept]
    height, width = mask_logits.shape[1:]
    as_rles = len(queries) * height * width > MASKS
    chosen, rows = queries.unique(return_inverse=True)  # a query may give several instances
    masks, quality, boxes = [], [], []
    for strip in _masks_of_each(mask_logits, chosen):
        mask = strip > 0
        inside = strip.sigmoid().mul_(mask)
        area = mask.sum() + 1e-6
        quality.append(inside.sum() / area)
        boxes.append(mask_boxes(mask[None]))
        masks.append(encode_masks(mask[None])[0] if as_rles else mask)
    scores = scores * torch.stack(quality)[rows] if len(rows) else scores
    scores, order = scores.sort(descending=True)
    rows = rows[order]
    found = {"labels": labels[order], "scores": scores}
    if names:
        found["class_names"] = [names[label] for label in found["labels"].tolist()]
    if not len(rows):
        empty = torch.zeros(0, height, width, dtype=torch.bool, device=scores.device)
        return found | {"boxes": scores.new_zeros(0, 4), "masks": empty}
    found["boxes"] = torch.cat(boxes)[rows]
    if as_rles:
        return found | {"segmentations": [masks[row] for row in rows.tolist()]}
    return found | {"masks": torch.stack([masks[row] for row in rows.tolist()])}


def _masks_of_each(mask_logits: Tensor | FullMasks, queries: Tensor) -> Iterator[Tensor]:
    """Yields the mask logits (H, W) of each of some queries."""
    few = mask_logits[queries]
    for row in range(len(queries)):
        yield torch.cat(list(strips_of(few[row : row + 1])), 1)[0]


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


def on_cpu(record: dict) -> dict:
    """Returns a prediction with its tensors on the CPU, also those of dictionaries in it."""
    moved = {}
    for name, value in record.items():
        if isinstance(value, dict):
            moved[name] = on_cpu(value)
        else:
            moved[name] = value.cpu() if isinstance(value, Tensor) else value
    return moved


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
