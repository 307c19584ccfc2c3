"""mIoU and panoptic quality: counts of each image, which add up over images and ranks, and what they amount to."""

import math

import numpy as np
from torch import Tensor

from common.batch import Sample
from common.segments import segment_rows

Counts = dict[str, np.ndarray]


def segment_counts(
    found: dict, truth: Sample, crowd: np.ndarray | None, num_classes: int
) -> Counts:
    """What one prediction counts for: "semantic" (K, K) pixels if it has them; "panoptic" (4, K) segments with `crowd`.

    found: `semantic` (H, W), the class of each pixel; for segments `panoptic` (H, W) and `segments_info`
    truth: the image as in its file, with its crowds as segments of their own (`Dataset.load(..., keep_ignored=True)`)
    crowd: (N,) bool of the rows of truth.labels, which have a class but count as no segment; None: count no segments

    Raises ValueError for a map of another size than the image, or a label that is none of the K classes.
    """
    labels, segments, counts = truth.labels.numpy(), truth.segments.numpy(), {}
    if "semantic" in found:
        classes = np.append(labels, -1)[segments]  # -1 is the last: no class
        counts["semantic"] = confusion(
            classes, _checked(found["semantic"], segments.shape), num_classes
        )
    if crowd is not None:
        _checked(found["panoptic"], segments.shape)
        rows = {field: value.numpy() for field, value in segment_rows(found).items()}
        counts["panoptic"] = match_segments(
            segments, labels, crowd, rows["segments"], rows["labels"], num_classes
        )
    return counts


def _checked(predicted: Tensor, size: tuple[int, int]) -> np.ndarray:
    if tuple(predicted.shape) != size:
        raise ValueError(f"a map of {tuple(predicted.shape)} was predicted for an image of {size}")
    return predicted.cpu().numpy().astype(np.int64)


def _check_labels(labels: np.ndarray, num_classes: int) -> None:
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(f"the dataset has {num_classes} classes, but label {wrong} was predicted")


def confusion(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(K, K) int64: the pixels of true class (row) and predicted class (column); truth of -1 does not count."""
    _check_labels(predicted, num_classes)
    known = truth >= 0
    pairs = truth[known] * num_classes + predicted[known]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def match_segments(
    truth: np.ndarray,
    truth_labels: np.ndarray,
    crowd: np.ndarray,
    found: np.ndarray,
    found_labels: np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """(4, K) float64: true positives, false positives, false negatives, the sum of the IoU of the true positives.

    truth, found: (H, W) rows of truth_labels (T,) and found_labels (N,), -1: void, no segment

    Two segments of one class match if their IoU is above 0.5; void counts in no union. A segment that lies by more than
    half in void or in crowds of its class is no false positive.
    Source: cocodataset/panopticapi:panopticapi/evaluation.py, which looks at one crowd of each class.
    """
    _check_labels(found_labels, num_classes)
    shape = len(truth_labels) + 1, len(found_labels) + 1
    pairs = (
        truth.astype(np.int64) % shape[0] * shape[1] + found % shape[1]
    )  # -1 becomes the last row, the last column
    overlap = np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    both, void, area = overlap[:-1, :-1], overlap[-1, :-1], overlap[:, :-1].sum(axis=0)
    union = overlap[:-1].sum(axis=1, keepdims=True) + area - both - void  # (T, N)
    iou = both / np.maximum(union, 1)
    same = truth_labels[:, None] == found_labels
    match = same & ~crowd[:, None] & (iou > 0.5)
    forgiven = void + (both * (same & crowd[:, None])).sum(axis=0) > 0.5 * area

    def count(labels, weights=None):
        return np.bincount(labels, weights, minlength=num_classes)

    hit, partner = match.any(axis=1), match.any(axis=0)
    missed, wrong = ~hit & ~crowd, ~partner & ~forgiven
    overlaps = count(truth_labels[hit], iou.max(axis=1, initial=0, where=match)[hit])
    return np.stack(
        [
            count(truth_labels[hit]),
            count(found_labels[wrong]),
            count(truth_labels[missed]),
            overlaps,
        ]
    )


def segment_results(counts: Counts, is_thing: tuple[bool, ...] | None) -> dict[str, float]:
    """The metrics in 0..1 of summed counts; with "panoptic" those of `panoptic_results`, with "semantic" of mIoU.

    Panoptic datasets have mIoU alone of the semantic ones. What has no class to average is NaN.
    """
    results = panoptic_results(counts["panoptic"], is_thing) if "panoptic" in counts else {}
    semantic = semantic_results(counts["semantic"]) if "semantic" in counts else {}
    return results | ({"mIoU": semantic["mIoU"]} if results and semantic else semantic)


def semantic_results(matrix: np.ndarray) -> dict[str, float]:
    """mIoU, fwIoU (weighted by the pixels of the class), mACC (mean recall), pACC (of pixels) of a (K, K) confusion.

    A class without a pixel in the ground truth is in no mean, even if it was predicted.
    Source: facebookresearch/detectron2:detectron2/evaluation/sem_seg_evaluation.py.
    """
    there = matrix.sum(axis=1) > 0
    true, right = matrix.sum(axis=1)[there], matrix.diagonal()[there]
    iou = right / (true + matrix.sum(axis=0)[there] - right)
    weights = true / max(true.sum(), 1)
    weighted = [
        float((weights * values).sum()) if there.any() else math.nan
        for values in (iou, right / true)
    ]
    return {
        "mIoU": _mean(iou),
        "fwIoU": weighted[0],
        "mACC": _mean(right / true),
        "pACC": weighted[1],
    }


def panoptic_results(counts: np.ndarray, is_thing: tuple[bool, ...] | None) -> dict[str, float]:
    """PQ, SQ, RQ, and PQ of things and of stuff (if is_thing tells them apart): means over the classes in `counts`.

    counts: (4, K) of `match_segments`; a class with no segment, neither true nor predicted, is in no mean.
    """
    tp, fp, fn, iou = counts
    objects = np.maximum(tp + fp / 2 + fn / 2, 0.5)
    quality = {"PQ": iou / objects, "SQ": iou / np.maximum(tp, 1), "RQ": tp / objects}
    there = tp + fp + fn > 0
    results = {name: _mean(values[there]) for name, values in quality.items()}
    if is_thing is not None:
        thing = np.array(is_thing)
        results |= {
            "PQ things": _mean(quality["PQ"][there & thing]),
            "PQ stuff": _mean(quality["PQ"][there & ~thing]),
        }
    return results


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
