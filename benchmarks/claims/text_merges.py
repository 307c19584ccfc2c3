"""Merges the classes of the generated coco and oid whose names have similar text.

    python -m benchmarks.claims.text_merges

Writes text_merges.csv, a label space for unidet.py: pairs of names whose MiniLM embeddings have a
cosine of at least THRESHOLD, the most similar first, each class in one pair at most. The threshold
is about the best one by the true pairs, which no training knows.
"""

from pathlib import Path

from common.datasets.tiny.generate import category_ids
from common.merges import Group, write_groups
from common.text import embed

TABLE = Path(__file__).with_suffix(".csv")
THRESHOLD = 0.85
FIRST, SECOND = "coco", "oid"


def similar_pairs() -> tuple[list[Group], list[float]]:
    """Returns the pairs and, as their costs, 1 - cosine."""
    first, second = (list(category_ids(name)) for name in (FIRST, SECOND))
    cosines = embed(first, "minilm") @ embed(second, "minilm").T
    pairs = [(float(cosines[i, j]), i, j) for i, j in (cosines >= THRESHOLD).nonzero().tolist()]
    groups, costs, taken = [], [], set()
    for cosine, i, j in sorted(pairs, reverse=True):
        members = {(FIRST, i), (SECOND, j)}
        if not members & taken:
            taken |= members
            groups.append({FIRST: first[i], SECOND: second[j]})
            costs.append(max(0.0, 1 - cosine))
    return groups, costs


if __name__ == "__main__":
    write_groups(TABLE, [FIRST, SECOND], *similar_pairs())
