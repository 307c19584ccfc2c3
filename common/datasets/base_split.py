"""Splits of known datasets in which some classes, the novel ones, have no training box."""

import json
import logging
from dataclasses import replace

import numpy as np

from common.datasets.dataset import Dataset
from common.labels import DATA, Vocabulary

log = logging.getLogger("concord")
RARE = ("truck", "bus", "train", "motorcycle")  # the four with the fewest objects in Cityscapes


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


def cityscapes_part(cityscapes: Dataset, split: str, name: str) -> Dataset:
    """Returns Cityscapes' objects with a part of their eight classes annotated; see RARE.

    It is for experiments on what partial annotation costs. If `split` is "train", every sixth image
    is of "cityscapes-rare" and has boxes of the rare classes alone. The others are of
    "cityscapes-common" and lack these. In other splits both have all images and boxes.

    name: of the part
    """
    rare_part = name == "cityscapes-rare"
    if split == "train":
        is_sixth = np.arange(len(cityscapes)) % 6 == 5
        cityscapes = cityscapes.select(is_sixth == rare_part)
    known = Vocabulary.known("cityscapes")
    things = [i for i, is_thing in enumerate(known.is_thing) if is_thing]
    names = tuple(known.names[i] for i in things)
    ids = tuple(known.ids[i] for i in things)
    novel_ids = [id for id, label in zip(ids, names) if (label in RARE) != rare_part]
    return _base_split(cityscapes, Vocabulary(name, names, ids), novel_ids, split)


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
