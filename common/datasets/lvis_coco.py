"""LVIS with the boxes that COCO has in the same images: the dataset lvis+coco.

Source: facebookresearch/Detic:tools/merge_lvis_coco.py.
"""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.boxes import paired_iou
from common.datasets.dataset import Dataset
from common.datasets.index import Index, JsonRows
from common.datasets.readers.coco import read_coco
from common.errors import InputError
from common.labels import fold

log = logging.getLogger("concord")
NAME = "lvis+coco"
COCO = "coco/annotations/instances_train2017.json"  # below the data root
DUPLICATE = 0.7  # least IoU of two boxes of one object
# COCO's classes that LVIS names otherwise. The two share a synset, but for the hot dog.
OTHER_NAMES = {
    "car": "car_(automobile)",
    "bus": "bus_(vehicle)",
    "train": "train_(railroad_vehicle)",
    "fire hydrant": "fireplug",
    "tie": "necktie",
    "skis": "ski",
    "sports ball": "ball",
    "wine glass": "wineglass",
    "orange": "orange_(fruit)",
    "hot dog": "sausage",
    "donut": "doughnut",
    "couch": "sofa",
    "potted plant": "flowerpot",
    "tv": "television_set",
    "laptop": "laptop_computer",
    "mouse": "mouse_(computer_equipment)",
    "remote": "remote_control",
    "keyboard": "computer_keyboard",
    "cell phone": "cellular_telephone",
    "microwave": "microwave_oven",
    "hair drier": "hair_dryer",
}


def lvis_with_coco(lvis: Dataset, split: str) -> Dataset:
    """Returns LVIS. If `split` is "train", its images have the boxes of COCO, too.

    Of COCO, crowds are left out, and boxes of images that LVIS lacks or has no box in, of classes
    that LVIS lacks or says are absent from the image, and of objects that LVIS boxes itself: with
    the same class and an IoU of at least 0.7. What is left out is logged.
    Raises InputError if the file of COCO is not in the data root.
    """
    lvis = replace(lvis, name=NAME, vocabulary=replace(lvis.vocabulary, dataset=NAME))
    if split != "train":
        return lvis
    root = Path(lvis.index.source).parents[1]  # LVIS is in root/lvis/
    file = root / COCO
    if not file.is_file():
        raise InputError(
            f"dataset '{NAME}' also reads {file}, which does not exist; put COCO 2017 there, or "
            "train on lvis alone"
        )
    coco = read_coco("coco", file, lvis.images, "coco")
    images, labels = places(lvis, coco)
    index = lvis.index
    known = (images >= 0) & (labels >= 0)
    rows = np.flatnonzero(known & ~coco.index.ignore)
    absent = is_absent(lvis, images[rows], labels[rows])
    rows = rows[~absent]
    double = is_duplicate(lvis, coco.index.boxes[rows], images[rows], labels[rows])
    rows = rows[~double]
    message = (
        "%s: %d boxes of COCO are added to the %d of LVIS; left out are %d of other images or "
        "classes, %d crowds, %d of classes that LVIS says are absent, %d that LVIS has (IoU >= %g)"
    )
    counts = ((~known).sum(), (known & coco.index.ignore).sum(), absent.sum(), double.sum())
    log.info(message, NAME, len(rows), len(index.labels), *counts, DUPLICATE)
    index = extended(index, coco.index, rows, images[rows], labels[rows])
    supervision = "boxes" if index.segmentations is None else "instances"
    return replace(lvis, index=index, supervision=supervision)


def places(lvis: Dataset, coco: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image and the label in LVIS of each box of COCO: (A,), (A,), -1 without one.

    An image of LVIS without a box is none. Images are known by the names of their files.
    """
    filled = np.diff(lvis.index.offsets) > 0
    row_of = {}
    for row in np.flatnonzero(filled).tolist():
        row_of[Path(lvis.index.file_name(row)).name] = row
    names = [Path(coco.index.file_name(row)).name for row in range(len(coco))]
    image_of = np.array([row_of.get(name, -1) for name in names], dtype=np.int64)
    label_of_name = {fold(name): label for label, name in enumerate(lvis.vocabulary.names)}
    wanted = [OTHER_NAMES.get(name, name) for name in coco.vocabulary.names]
    label_of = np.array([label_of_name.get(fold(name), -1) for name in wanted], dtype=np.int64)
    return image_of[coco.index.image_of], label_of[coco.index.labels]


def is_absent(lvis: Dataset, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Tells of which pairs (image, label) LVIS has verified that they are absent: (N,) bool."""
    if lvis.index.negatives is None:
        return np.zeros(len(images), bool)
    count = len(lvis.vocabulary)
    absent = []
    for image, listed in enumerate(lvis.index.negatives):
        absent += [image * count + label for label in listed]
    return np.isin(images * count + labels, absent)


def is_duplicate(
    lvis: Dataset, boxes: np.ndarray, images: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Tells which boxes (N, 4) LVIS has in the same image with the same label: (N,) bool."""
    count = len(lvis.vocabulary)
    keys = lvis.index.image_of * count + lvis.index.labels
    order = np.argsort(keys, kind="stable")
    wanted = images * count + labels
    first = np.searchsorted(keys[order], wanted, "left")
    last = np.searchsorted(keys[order], wanted, "right")
    # a pair for each box of LVIS that a box can be compared with
    row = np.repeat(np.arange(len(boxes)), last - first)
    start = np.cumsum(last - first) - (last - first)
    within = np.arange(len(row)) - start[row]
    other = order[first[row] + within]
    pairs = (boxes[row], lvis.index.boxes[other])
    iou = paired_iou(*map(torch.from_numpy, pairs)).numpy()
    double = np.zeros(len(boxes), bool)
    double[row[iou >= DUPLICATE]] = True
    return double


def extended(
    index: Index, other: Index, rows: np.ndarray, images: np.ndarray, labels: np.ndarray
) -> Index:
    """Returns `index` with the annotations `rows` of another one, in `images`, with `labels`."""
    image_of = np.concatenate([index.image_of, images])
    order = np.argsort(image_of, kind="stable")
    columns = {"labels": [index.labels, labels.astype(np.int32)]}
    for name in ("boxes", "areas", "ignore"):
        columns[name] = [getattr(index, name), getattr(other, name)[rows]]
    joined = {name: np.concatenate(parts)[order] for name, parts in columns.items()}
    masks = [JsonRows.none(len(part.labels)) for part in (index, other)]
    if index.segmentations is not None:
        masks[0] = index.segmentations
    if other.segmentations is not None:
        masks[1] = other.segmentations
    segmentations = JsonRows.join(masks[0], masks[1].take(rows)).take(order)
    if not segmentations.filled.any():
        segmentations = None
    counts = np.bincount(image_of, minlength=len(index))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return replace(index, offsets=offsets, segmentations=segmentations, **joined)
