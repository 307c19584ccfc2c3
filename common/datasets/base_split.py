"""Open-vocabulary splits of known datasets: the novel classes keep their names and lose their training boxes."""

import json
import logging
from dataclasses import replace

import numpy as np

from common.datasets.dataset import Dataset
from common.labels import DATA, Vocabulary

log = logging.getLogger("concord")


def lvis_base(lvis: Dataset, split: str) -> Dataset:
    """LVIS whose rare classes are novel. Source: facebookresearch/Detic:tools/remove_lvis_rare.py."""
    rare = [id for id, frequency in zip(lvis.vocabulary.ids, lvis.frequency) if frequency == "r"]
    return base_split(lvis, replace(lvis.vocabulary, dataset="lvis-base"), rare, split)


def coco_base(coco: Dataset, split: str) -> Dataset:
    """COCO with 48 base and 17 novel classes; the other 15 are in neither split, nor are images without a box left.

    Source: alirezazareian/ovr-cnn:ipynb/001.ipynb; Detic uses these files.
    """
    known = Vocabulary.known("coco-base")
    present = [
        i for i, id in enumerate(known.ids) if id in coco.vocabulary.index_of_id
    ]  # a small file may lack some
    names, ids = (tuple(values[i] for i in present) for values in (known.names, known.ids))
    novel = json.loads((DATA / "vocabularies" / "coco-base.json").read_text())["novel"]
    novel_ids = [id for id, name in zip(ids, names) if name in novel]
    dataset = base_split(coco, Vocabulary("coco-base", names, ids), novel_ids, split)
    filled = np.diff(dataset.index.offsets) > 0
    log.info(
        "coco-base: %d of %d %s images without a box are left out",
        (~filled).sum(),
        len(filled),
        split,
    )
    return replace(dataset, index=dataset.index.select(filled))


def base_split(whole: Dataset, vocabulary: Vocabulary, novel_ids: list[int], split: str) -> Dataset:
    """`whole` with the classes of `vocabulary` alone, in the split train without the boxes of the novel ones.

    Images stay even if nothing is left in them. How many boxes went is said in the log.
    """
    label_of = np.array(
        [vocabulary.index_of_id.get(id, -1) for id in whole.vocabulary.ids]
    )  # (C of `whole`,)
    novel = [vocabulary.index_of_id[id] for id in novel_ids]
    labels = label_of[whole.index.labels].astype(np.int32)  # (A,)
    kept = labels >= 0
    if split == "train":
        kept &= ~np.isin(labels, novel)
    log.info(
        "%s: %d of %d %s boxes are left out; %d base and %d novel classes",
        *(
            vocabulary.dataset,
            (~kept).sum(),
            len(kept),
            split,
            len(vocabulary) - len(novel),
            len(novel),
        ),
    )
    index = replace(whole.index.keep(kept), labels=labels[kept])
    frequency = whole.frequency if len(vocabulary) == len(whole.vocabulary) else None
    return replace(
        whole,
        name=vocabulary.dataset,
        vocabulary=vocabulary,
        index=index,
        frequency=frequency,
        novel=tuple(novel),
    )
