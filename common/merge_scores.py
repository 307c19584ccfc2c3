"""Scores merged classes against the truth, which is known of the generated datasets alone."""

import math
from itertools import combinations

import numpy as np

from common.datasets.tiny.generate import TINY
from common.datasets.tiny.scene import emoji
from common.labels import LabelSpace
from common.text import embed

Pairs = set[tuple[int, int]]  # classes of two datasets, numbered dataset after dataset


def merge_scores(label_space: LabelSpace) -> dict[str, dict[str, float]]:
    """Compares the merged classes with the true ones, and with two other ways to merge.

    These are equal names, and a cosine of MiniLM's embeddings above a threshold. The threshold is
    the one with the highest F1: no training could know it. Precision is NaN without a pair.

    Returns {way: {"precision", "recall", "F1"}} of pairs of classes, in 0..1; {} if one of the
    datasets is not a generated one.
    """
    vocabularies = list(label_space.vocabularies.values())
    if not set(label_space.datasets) <= TINY.keys():
        return {}
    true = true_pairs(label_space)
    by_name = merged_pairs(LabelSpace(vocabularies, merge=True))
    threshold, by_text = best_by_text(label_space, true)
    return {
        "merges": score(merged_pairs(label_space), true),
        "merges (equal names)": score(by_name, true),
        f"merges (text, best cosine {threshold:.2f})": score(by_text, true),
    }


def pairs_of_datasets(label_space: LabelSpace) -> list[tuple[int, int]]:
    """Returns all pairs of classes of two datasets."""
    owners = []
    for dataset, vocabulary in label_space.vocabularies.items():
        owners += [dataset] * len(vocabulary)
    pairs = combinations(range(len(owners)), 2)
    return [(a, b) for a, b in pairs if owners[a] != owners[b]]


def true_pairs(label_space: LabelSpace) -> Pairs:
    """Returns the pairs of classes that are drawn alike.

    More than half of the emoji of the two are emoji of both. So a class has at most one partner in
    another dataset.
    """
    art = []
    for dataset, vocabulary in label_space.vocabularies.items():
        of_class = emoji(dataset)
        art += [set(of_class.get(name, ())) for name in vocabulary.names]
    pairs = set()
    for a, b in pairs_of_datasets(label_space):
        shared = art[a] & art[b]
        if 2 * len(shared) > len(art[a] | art[b]):
            pairs.add((a, b))
    return pairs


def merged_pairs(label_space: LabelSpace) -> Pairs:
    """Returns the pairs of classes that share a column."""
    columns = []
    for dataset in label_space.datasets:
        columns += label_space.columns(dataset).tolist()
    pairs = pairs_of_datasets(label_space)
    return {(a, b) for a, b in pairs if columns[a] == columns[b]}


def best_by_text(label_space: LabelSpace, true: Pairs) -> tuple[float, Pairs]:
    """Returns the threshold with the highest F1, and the pairs with this cosine or a higher one."""
    names = []
    for vocabulary in label_space.vocabularies.values():
        names += vocabulary.names
    text = embed(names, "minilm")
    cosines = (text @ text.T).tolist()
    pairs = pairs_of_datasets(label_space)
    pairs.sort(key=lambda pair: -cosines[pair[0]][pair[1]])
    right = [pair in true for pair in pairs]
    hits = np.cumsum(right)
    found = np.arange(1, len(pairs) + 1)
    f1 = 2 * hits / (found + len(true))
    best = int(f1.argmax())
    first, second = pairs[best]
    return cosines[first][second], set(pairs[: best + 1])


def score(found: Pairs, true: Pairs) -> dict[str, float]:
    """Returns precision, recall and F1 of the pairs; NaN for one without a pair."""
    hits = len(found & true)
    counts = {"precision": len(found), "recall": len(true), "F1": (len(found) + len(true)) / 2}
    return {name: hits / count if count else math.nan for name, count in counts.items()}
