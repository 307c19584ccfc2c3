"""Views of known datasets whose classes are coarser."""

import logging
from dataclasses import replace

import numpy as np

from common.datasets.dataset import Dataset
from common.errors import InputError
from common.evaluation import ancestors
from common.labels import Vocabulary

log = logging.getLogger("concord")


def oid_top(oid: Dataset, split: str) -> Dataset:
    """Returns Open Images with the classes that its tree has at the top, for all that are below.

    A class that is below several of them becomes the first. The tree stays, so that the classes
    below can be found by their names. Raises InputError without a tree.
    """
    if oid.hierarchy is None:
        raise InputError(
            f"oid-top needs the class tree beside {oid.index.source}; download"
            " bbox_labels_600_hierarchy.json"
        )
    vocabulary = oid.vocabulary
    upward = ancestors(vocabulary, oid.hierarchy)  # (C, C)
    depth = upward.sum(1)
    tops = np.flatnonzero(depth == 1)
    top_of = upward[:, tops].argmax(1).astype(np.int32)  # (C,)
    names = tuple(vocabulary.names[top] for top in tops)
    ids = tuple(vocabulary.ids[top] for top in tops)
    log.info("oid-top: %d of %d %s classes are at the top", len(tops), len(vocabulary), split)
    index = replace(oid.index, labels=top_of[oid.index.labels])
    if index.verified is not None:
        present = [sorted(set(top_of[list(labels)].tolist())) for labels in index.verified]
        absent = [[label for label in labels if label in tops] for labels in index.negatives]
        negatives = [top_of[labels].tolist() for labels in absent]  # of a class below, nothing
        index = replace(index, verified=present, negatives=negatives)
    return replace(oid, name="oid-top", vocabulary=Vocabulary("oid-top", names, ids), index=index)
