"""mIoU and panoptic quality, computed from counts that are summed over images and ranks."""

import logging
import math

import numpy as np
from torch import Tensor

from common.batch import Sample
from common.labels import Vocabulary, quoted
from common.segments import segment_rows
from common.tables import Columns, Scores, mean_of_known

log = logging.getLogger("concord")
Counts = dict[str, np.ndarray]


def segment_counts(
    found: dict, truth: Sample, crowd: np.ndarray | None, num_classes: int
) -> Counts:
    """Computes the counts of one image. K is `num_classes`.

    Returns "semantic" (K, K), the `confusion` of the pixels, if `found` has `semantic`, and
    "panoptic" (4, K), the counts of `match_segments`, if `crowd` is given.
    found: a prediction; `semantic` (H, W) is the class of each pixel. If `crowd` is given, it must
           have `panoptic` (H, W) and `segments_info`.
    truth: the image, not resized, with crowds as segments (`Dataset.load(..., keep_ignored=True)`)
    crowd: (N,) bool, True where a row of truth.labels is a crowd. A crowd has a class, but need not
           be found.

    Raises ValueError if a predicted map is not as large as the image, or a predicted label is
    outside the K classes.
    """
    labels = truth.labels.numpy()
    segments = truth.segments.numpy()
    counts = {}
    if "semantic" in found:
        classes = np.append(labels, -1)[segments]  # pixels without a segment (-1) get the class -1
        predicted = _checked(found["semantic"], segments.shape)
        counts["semantic"] = confusion(classes, predicted, num_classes)
    if crowd is not None:
        _checked(found["panoptic"], segments.shape)
        rows = segment_rows(found)
        counts["panoptic"] = match_segments(
            truth=segments,
            truth_labels=labels,
            crowd=crowd,
            found=rows["segments"].numpy(),
            found_labels=rows["labels"].numpy(),
            num_classes=num_classes,
        )
    return counts


def _checked(predicted: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Returns the map as int64; raises ValueError if its shape is not `size`, (height, width)."""
    shape = tuple(predicted.shape)
    if shape != size:
        raise ValueError(f"a map of {shape} was predicted for an image of {size}")
    return predicted.cpu().numpy().astype(np.int64)


def _check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError if a label is not in 0..num_classes - 1."""
    if not labels.size:
        return
    lowest = labels.min()
    highest = labels.max()
    if lowest < 0 or highest >= num_classes:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"the dataset has {num_classes} classes, but label {wrong} was predicted")


def confusion(truth: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts the pixels of each true class (row) and predicted class (column): (K, K) int64.

    Pixels whose true class is -1 are left out. K is `num_classes`.
    Raises ValueError if a predicted label is outside the K classes.
    """
    _check_labels(predicted, num_classes)
    known = truth >= 0
    pairs = truth[known] * num_classes + predicted[known]
    counts = np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def match_segments(
    truth: np.ndarray,
    truth_labels: np.ndarray,
    crowd: np.ndarray,
    found: np.ndarray,
    found_labels: np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """Returns (4, K): per class true positives, false positives, false negatives and summed IoU.

    truth, found:               (H, W) int, the segment of each pixel; -1 is void
    truth_labels, found_labels: (T,) and (N,), the class of each segment; crowd: (T,) bool

    The IoU is summed over true positives. Two segments of a class match if their IoU is above 0.5.
    Unions leave out pixels whose truth is void. Crowds are not matched and are no false negatives.
    A found segment with more than half its area in void or in crowds of its class is no false
    positive.
    Raises ValueError if a found label is outside the K classes.
    Source: cocodataset/panopticapi:panopticapi/evaluation.py, which uses one crowd per class.
    """
    _check_labels(found_labels, num_classes)
    lines = len(truth_labels) + 1
    columns = len(found_labels) + 1
    # void (-1) becomes the last line and the last column
    line = truth.astype(np.int64) % lines
    column = found % columns
    pairs = line * columns + column
    overlap = np.bincount(pairs.ravel(), minlength=lines * columns)
    overlap = overlap.reshape(lines, columns)
    both = overlap[:-1, :-1]  # (T, N)
    void = overlap[-1, :-1]
    area = overlap[:, :-1].sum(axis=0)
    true_area = overlap[:-1].sum(axis=1, keepdims=True)  # (T, 1)
    union = true_area + area - both - void  # (T, N)
    iou = both / np.maximum(union, 1)
    same = truth_labels[:, None] == found_labels
    own_crowd = same & crowd[:, None]
    own_segment = same & ~crowd[:, None]
    match = own_segment & (iou > 0.5)
    in_crowds = (both * own_crowd).sum(axis=0)
    forgiven = void + in_crowds > 0.5 * area

    def count(labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(labels, weights, minlength=num_classes)

    hit = match.any(axis=1)  # (T,)
    missed = ~hit & ~crowd
    wrong = ~match.any(axis=0) & ~forgiven  # (N,)
    best = iou.max(axis=1, initial=0, where=match)
    hit_labels = truth_labels[hit]
    tp = count(hit_labels)
    fp = count(found_labels[wrong])
    fn = count(truth_labels[missed])
    sums = count(hit_labels, best[hit])
    return np.stack([tp, fp, fn, sums])


def segment_results(counts: Counts, vocabulary: Vocabulary) -> Scores:
    """Computes the metrics from summed counts, in 0..1. A mean over no class is NaN.

    "semantic" counts alone give `semantic_results`. "panoptic" counts give `panoptic_results`; if
    there are also "semantic" counts, mIoU is added. The classes have the columns of both.
    """
    results = {}
    classes = {"class": vocabulary.names}
    if "panoptic" in counts:
        results |= panoptic_results(counts["panoptic"], vocabulary.is_thing)
        classes |= panoptic_classes(counts["panoptic"])
    if "semantic" in counts:
        semantic = semantic_results(counts["semantic"])
        results |= {"mIoU": semantic["mIoU"]} if results else semantic
        classes |= semantic_classes(counts["semantic"])
    return Scores(results, classes)


def image_score(counts: Counts) -> float:
    """Returns the mIoU of one image from its counts, or PQ without a semantic map.

    It is a mean over the classes of the image; NaN if it has none.
    """
    if "semantic" in counts:
        return semantic_results(counts["semantic"])["mIoU"]
    return panoptic_results(counts["panoptic"], None)["PQ"]


def warn_of_absent(title: str, counts: Counts, names: tuple[str, ...]) -> None:
    """Logs which classes have no pixel in the ground truth: the metrics are means over the others.

    names: K class names; counts: summed, nothing is said without "semantic" ones
    """
    if "semantic" not in counts:
        return
    present = counts["semantic"].sum(axis=1) > 0
    absent = [name for name, there in zip(names, present) if not there]
    if not absent:
        return
    message = (
        "%s: %d of %d classes have no pixel in the ground truth, so that the means are over the "
        "other %d: %s"
    )
    counts_of = (len(absent), len(names), len(names) - len(absent))
    log.warning(message, title, *counts_of, quoted(absent))


def semantic_classes(matrix: np.ndarray) -> Columns:
    """Computes IoU and "recall" (K,) from the matrix (K, K) of `confusion`, in 0..1.

    They are NaN for a class without a true pixel, even if it was predicted. "share" (K,) is that of
    the class in all true pixels.
    """
    true = matrix.sum(axis=1)
    predicted = matrix.sum(axis=0)
    right = matrix.diagonal()
    union = true + predicted - right
    present = true > 0
    iou = np.where(present, right / np.maximum(union, 1), math.nan)
    recall = np.where(present, right / np.maximum(true, 1), math.nan)
    return {"IoU": iou, "recall": recall, "share": true / max(true.sum(), 1)}


def semantic_results(matrix: np.ndarray) -> dict[str, float]:
    """Computes mIoU, fwIoU, mACC and pACC from the matrix (K, K) of `confusion`, in 0..1.

    fwIoU is the IoU weighted by the true pixels of the class. mACC is the mean recall. pACC is the
    share of right pixels. Classes without a true pixel are left out, even if they were predicted.
    Source: facebookresearch/detectron2:detectron2/evaluation/sem_seg_evaluation.py.
    """
    iou, recall, share = semantic_classes(matrix).values()

    def weighted(values: np.ndarray) -> float:
        present = share > 0
        return float((share * values)[present].sum()) if present.any() else math.nan

    return {
        "mIoU": mean_of_known(iou),
        "fwIoU": weighted(iou),
        "mACC": mean_of_known(recall),
        "pACC": weighted(recall),
    }


def panoptic_classes(counts: np.ndarray) -> Columns:
    """Computes PQ, SQ and RQ (K,) in 0..1, and the number of true "segments" without crowds (K,).

    counts: (4, K) of `match_segments`; a class without a true or predicted segment is NaN
    """
    tp, fp, fn, iou = counts
    objects = np.where(tp + fp + fn > 0, tp + fp / 2 + fn / 2, math.nan)
    pq = iou / objects
    sq = np.where(np.isnan(objects), math.nan, iou / np.maximum(tp, 1))
    return {"PQ": pq, "SQ": sq, "RQ": tp / objects, "segments": (tp + fn).astype(np.int64)}


def panoptic_results(counts: np.ndarray, is_thing: tuple[bool, ...] | None) -> dict[str, float]:
    """Computes PQ, SQ and RQ in 0..1, means over classes.

    counts:   (4, K) of `match_segments`; classes without a true or predicted segment are left out
    is_thing: (K,), True for a thing, False for stuff. If it is given, the result also has
              "PQ things" and "PQ stuff".
    """
    classes = panoptic_classes(counts)
    results = {name: mean_of_known(classes[name]) for name in ("PQ", "SQ", "RQ")}
    if is_thing is not None:
        thing = np.array(is_thing)
        results["PQ things"] = mean_of_known(classes["PQ"][thing])
        results["PQ stuff"] = mean_of_known(classes["PQ"][~thing])
    return results
