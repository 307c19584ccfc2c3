"""Accuracy of detections on datasets that have image-level labels alone."""

import math

import numpy as np

from common.datasets.index import Index
from common.labels import Vocabulary
from common.tables import Scores

PLACES = (1, 5)  # of a class among those that were found in an image


def best_classes(prediction: dict, count: int) -> list[int]:
    """Returns the `count` classes of an image's best boxes, each once, the best first.

    A class has the score of its best box. prediction: with `labels` and `scores` (N,)
    """
    order = prediction["scores"].argsort(descending=True, stable=True)
    ranked = dict.fromkeys(prediction["labels"][order].tolist())
    return list(ranked)[:count]


def label_accuracy(
    index: Index,
    vocabulary: Vocabulary,
    predictions: dict[int, dict],
    groups: dict[str, np.ndarray] | None = None,
) -> Scores:
    """Returns top1 and top5: the shares of images with a label among their 1 or 5 `best_classes`.

    Images without a label do not count. An image without a box is a miss. Each group of classes
    {name: (C,) bool} adds "top1 <name>", the share of its labels that are the best class.
    Its `classes` have top1 and top5 of the images with the class, and their number, "images".
    """
    count = len(vocabulary)
    images = np.zeros(count, dtype=np.int64)  # with the class
    hits = np.zeros((len(PLACES), count), dtype=np.int64)
    right = []  # of each image: whether a label is among the best 1, the best 5
    for row, prediction in predictions.items():
        labels = np.unique(index.image_labels[index.image_label_rows(row)]).tolist()
        if not labels:
            continue
        ranked = best_classes(prediction, max(PLACES))
        images[labels] += 1
        for of_place, place in zip(hits, PLACES):
            of_place[[label for label in labels if label in ranked[:place]]] += 1
        right.append([not set(labels).isdisjoint(ranked[:place]) for place in PLACES])
    means = np.mean(right, axis=0) if right else [math.nan] * len(PLACES)
    results = {f"top{place}": float(mean) for place, mean in zip(PLACES, means)}
    for name, members in (groups or {}).items():
        own = np.asarray(members)
        total = images[own].sum()
        results[f"top1 {name}"] = float(hits[0, own].sum() / total) if total else math.nan
    shares = np.where(images > 0, hits / np.maximum(images, 1), math.nan)
    columns = {f"top{place}": share for place, share in zip(PLACES, shares)}
    return Scores(results, {"class": vocabulary.names} | columns | {"images": images})
