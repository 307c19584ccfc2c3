"""Splits of known datasets in which some classes, the novel ones, have no training box."""

import json
import logging
from dataclasses import replace

import numpy as np

from common.datasets.dataset import Dataset
from common.labels import DATA, Vocabulary

log = logging.getLogger("concord")


def lvis_base(lvis: Dataset, split: str) -> Dataset:
    """Returns LVIS with its rare classes as novel classes. In "train" these have no boxes.

    Source: facebookresearch/Detic:tools/remove_lvis_rare.py.
    """
    frequencies = zip(lvis.vocabulary.ids, lvis.frequency)
    rare = [id for id, frequency in frequencies if frequency == "r"]
    return _base_split(lvis, replace(lvis.vocabulary, dataset="lvis-base"), rare, split)


def coco_base(coco: Dataset, split: str) -> Dataset:
    """Returns COCO with 48 base and 17 novel classes, without the other 15.

    If `split` is "train", the boxes of the novel classes are removed; their names stay. In any
    split, images that have no box left are left out. Classes that the annotations lack are left
    out, too.
    Source: alirezazareian/ovr-cnn:ipynb/001.ipynb; Detic uses these files.
    """
    known = Vocabulary.known("coco-base")
    record = json.loads((DATA / "vocabularies" / "coco-base.json").read_text())
    # a small annotation file may lack some classes
    present = [i for i, id in enumerate(known.ids) if id in coco.vocabulary.index_of_id]
    names = tuple(known.names[i] for i in present)
    ids = tuple(known.ids[i] for i in present)
    novel_ids = [id for id, name in zip(ids, names) if name in record["novel"]]
    dataset = _base_split(coco, Vocabulary("coco-base", names, ids), novel_ids, split)
    filled = np.diff(dataset.index.offsets) > 0
    message = "coco-base: %d of %d %s images without a box are left out"
    log.info(message, (~filled).sum(), len(filled), split)
    return dataset.select(filled)


def coco_half(coco: Dataset, split: str, name: str, first: int) -> Dataset:
    """Returns half of COCO: every second image, in which every second class is annotated.

    The other classes are novel; their boxes are there unless `split` is "train". Images without a
    box stay.
    name:  of the half
    first: 0 for the first, third, ... image and class, in the order of the annotations; 1 for the
           others
    """
    novel_ids = list(coco.vocabulary.ids[1 - first :: 2])
    rows = np.arange(len(coco)) % 2 == first
    vocabulary = replace(coco.vocabulary, dataset=name)
    return _base_split(coco.select(rows), vocabulary, novel_ids, split)


def _base_split(
    whole: Dataset, vocabulary: Vocabulary, novel_ids: list[int], split: str
) -> Dataset:
    """Returns a copy of `whole` that has only the classes of `vocabulary`.

    If `split` is "train", the boxes of the novel classes are removed. Images without a box stay.
    """
    label_of_id = vocabulary.index_of_id
    # label in `whole` -> label in `vocabulary`, or -1
    label_of = np.array([label_of_id.get(id, -1) for id in whole.vocabulary.ids])
    novel = tuple(label_of_id[id] for id in novel_ids)
    labels = label_of[whole.index.labels].astype(np.int32)  # (A,)
    kept = labels >= 0
    if split == "train":
        kept &= ~np.isin(labels, novel)
    message = "%s: %d of %d %s boxes are left out; %d base and %d novel classes"
    counts = (len(vocabulary) - len(novel), len(novel))
    log.info(message, vocabulary.dataset, (~kept).sum(), len(kept), split, *counts)
    return replace(
        whole,
        name=vocabulary.dataset,
        vocabulary=vocabulary,
        index=replace(whole.index.keep(kept), labels=labels[kept]),
        frequency=whole.frequency if len(vocabulary) == len(whole.vocabulary) else None,
        novel=novel,
    )
