"""Merges classes of the generated coco and oid in two ways that no training chooses.

    python -m benchmarks.claims.merges

Writes label spaces for unidet.py, of pairs with a class of each dataset:

text_merges.csv:   names whose MiniLM embeddings have a cosine of at least THRESHOLD, the most
                   similar first, each class in one pair at most. The threshold is the best one by
                   the true pairs, which no training knows: merging by text can do no better.
random_merges.csv: as many pairs as UniDet learns, drawn at random
"""

from pathlib import Path

import numpy as np

from common.datasets.tiny.generate import category_ids
from common.merges import Group, write_groups
from common.text import embed

FOLDER = Path(__file__).parent
THRESHOLD = 0.85
DRAWN = 40
DATASETS = ["coco", "oid"]


def text_merges() -> tuple[list[Group], list[float]]:
    """Returns the pairs of similar names and, as their costs, 1 - cosine."""
    first, second = (list(category_ids(name)) for name in DATASETS)
    cosines = embed(first, "minilm") @ embed(second, "minilm").T
    found = [(float(cosines[i, j]), i, j) for i, j in (cosines >= THRESHOLD).nonzero().tolist()]
    pairs, costs, taken = [], [], set()
    for cosine, i, j in sorted(found, reverse=True):
        members = {("first", i), ("second", j)}
        if not members & taken:
            taken |= members
            pairs.append((first[i], second[j]))
            costs.append(max(0.0, 1 - cosine))
    return [dict(zip(DATASETS, pair)) for pair in pairs], costs


def random_merges() -> tuple[list[Group], list[float]]:
    """Returns DRAWN pairs, without a class twice, and their costs, which are 0."""
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(list(category_ids(name)))[:DRAWN].tolist() for name in DATASETS]
    return [dict(zip(DATASETS, pair)) for pair in zip(*drawn)], [0.0] * DRAWN


TABLES = {"text_merges.csv": text_merges, "random_merges.csv": random_merges}

if __name__ == "__main__":
    for name, make in TABLES.items():
        write_groups(FOLDER / name, DATASETS, *make())
