"""Postprocessing of queries to label maps, panoptic maps and instances.

Each of Q queries has probabilities of K classes, and mask logits.
Source: facebookresearch/Mask2Former:mask2former/maskformer_model.py.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

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
STRIP = 2**24  # class scores of a strip: 64 MiB
LOGITS = 2**21  # mask logits of a strip of a large image: 8 MiB, so that they stay in the caches
WHOLE = 2**27  # mask logits of an image that are made at once: 512 MiB
MASKS = 2**30  # pixels of all instance masks of an image, a byte each


def restore(
    mask_logits: Tensor, padded: tuple[int, int], size: tuple[int, int], original: tuple[int, int]
) -> Tensor:
    """Resizes the mask logits of a padded input to the image in its file.

    mask_logits: (Q, h, w); padded, size, original: (height, width) of the input with its padding,
    of the input without it, and of the file

    Returns (Q, height, width) float32. It is the first step of every task but `semantic_labels`
    with `resize_scores`.
    """
    height, width = size
    batch = mask_logits[None].float()
    full = F.interpolate(batch, padded, mode="bilinear", align_corners=False)
    cropped = full[..., :height, :width]
    restored = F.interpolate(cropped, original, mode="bilinear", align_corners=False)
    return restored[0]


@dataclass(frozen=True)
class Rows:
    """Images (Q, h, w) that are cut and resized bilinearly, some rows at a time.

    source: a tensor, or other rows; window: (height, width) of the part of it; size: of the result
    """

    source: "Tensor | Rows"
    window: tuple[int, int]
    size: tuple[int, int]

    def read(self, start: int, stop: int) -> Tensor:
        """Returns the rows start..stop of the result, (Q, stop - start, width) float32.

        On a CPU with fused multiplication they equal those of F.interpolate bit by bit: it resizes
        the columns, and the rows are summed as it sums them. Elsewhere they differ by rounding.
        """
        height, width = self.window
        scale = torch.tensor(height / self.size[0])  # rounded to float32, as PyTorch does
        rows = torch.arange(start, stop, dtype=torch.float64)
        places = scale.double() * (rows + 0.5) - 0.5
        places = places.float().clamp(min=0)
        upper = places.long().clamp(max=height - 1)
        lower = (upper + 1).clamp(max=height - 1)
        first = int(upper[0])
        last = int(lower[-1]) + 1
        if isinstance(self.source, Tensor):
            part = self.source[:, first:last].float()
        else:
            part = self.source.read(first, last)
        part = part[..., :width]
        size = (last - first, self.size[1])
        wide = F.interpolate(part[None], size, mode="bilinear", align_corners=False)[0]
        below = (places - upper)[:, None].to(wide.device)  # the weight of the lower row
        above = 1 - below
        upper = wide.index_select(1, (upper - first).to(wide.device))
        lower = wide.index_select(1, (lower - first).to(wide.device))
        return lower.mul_(below).addcmul_(upper, above)


@dataclass(frozen=True)
class FullMasks:
    """The mask logits (Q, H, W) that `restore` returns, of which only some rows are in memory.

    logits, padded, size, original: as in `restore`
    steps: functions that make other masks of a strip (Q, rows, W), one after the other
    """

    logits: Tensor
    padded: tuple[int, int]
    size: tuple[int, int]
    original: tuple[int, int]
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Q, H, W), before the steps."""
        return (len(self.logits), *self.original)

    def __getitem__(self, queries: Tensor | slice) -> "FullMasks":
        """Returns the masks of some queries."""
        if self.steps:
            return replace(self, steps=(*self.steps, lambda strip: strip[queries]))
        return replace(self, logits=self.logits[queries])

    def through(
        self, function: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple["FullMasks", Tensor]:
        """Returns the masks that `function` makes of each strip, and its other result.

        The other result must not depend on the strip.
        """
        _, other = function(self.logits[:, :1])
        return replace(self, steps=(*self.steps, lambda strip: function(strip)[0])), other

    def strips(self) -> Iterator[Tensor]:
        """Yields the masks in strips (Q, rows, W) from top to bottom; one strip if they are few."""
        count, height, width = self.shape
        if count * height * width <= WHOLE:
            yield self._after_steps(restore(self.logits, self.padded, self.size, self.original))
            return
        padded = Rows(self.logits, tuple(self.logits.shape[1:]), self.padded)
        full = Rows(padded, self.size, self.original)
        rows = max(1, LOGITS // (count * width))
        for start in range(0, height, rows):
            yield self._after_steps(full.read(start, min(height, start + rows)))

    def _after_steps(self, strip: Tensor) -> Tensor:
        for step in self.steps:
            strip = step(strip)
        return strip


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

    It works in strips of rows, since scores of 150 classes are larger than all the masks.
    resize_scores: the scores are those of the network's input and are resized to the image, as
                   Mask2Former does for models of semantic segmentation alone. It needs FullMasks.
    """
    size = mask_logits.shape[1:]
    scores_per_row = max(probabilities.shape) * size[1]
    rows = max(1, STRIP // scores_per_row)
    # one tensor for all: small ones between the strips would keep their memory from the system
    labels = torch.empty(size, dtype=torch.int16, device=probabilities.device)
    if resize_scores:
        scores = input_scores(probabilities, mask_logits)
        for top, part in zip(range(0, size[0], rows), labels.split(rows)):
            part.copy_(scores.read(top, top + len(part)).argmax(0))
        return labels
    top = 0
    for masks in strips_of(mask_logits):
        for strip in masks.split(rows, 1):
            scores = semantic_map(probabilities, strip)
            bottom = top + strip.shape[1]
            labels[top:bottom] = scores.argmax(0)
            top = bottom
    return labels


def input_scores(probabilities: Tensor, masks: FullMasks) -> Rows:
    """Returns `semantic_map` of the network's input without padding, resized to the image."""
    of_input = replace(masks, original=masks.size)
    parts = [semantic_map(probabilities, strip) for strip in of_input.strips()]
    return Rows(torch.cat(parts, 1), masks.size, masks.original)


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
    size = mask_logits.shape[1:]
    winners = torch.empty(size, dtype=torch.int16, device=scores.device)
    top = 0
    for strip in strips_of(mask_logits):
        masks = strip.float().sigmoid()
        winner = (scores[:, None, None] * masks).argmax(0)  # (rows, W)
        inside = masks >= 0.5
        counts[0] += winner.flatten().bincount(minlength=num)
        counts[1] += inside.sum((1, 2))
        if intersect:
            is_inside = inside.gather(0, winner[None])[0]
            winner = winner.where(is_inside, num)
        counts[2] += winner.flatten().bincount(minlength=num + 1)[:num]
        bottom = top + strip.shape[1]
        winners[top:bottom] = winner
        top = bottom
    return winners, counts


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
    if not len(queries):
        return
    few = mask_logits[queries]
    if not isinstance(few, Tensor) and math.prod(few.shape) <= WHOLE:
        (few,) = few.strips()
    for row in range(len(queries)):
        if isinstance(few, Tensor):
            yield few[row].float()
        else:
            strips = few[row : row + 1].strips()
            yield torch.cat(list(strips), 1)[0]


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
