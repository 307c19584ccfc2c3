"""Mask AP of the things of a panoptic dataset, AP_th^pan: of instances that are predicted, too.

Source: facebookresearch/Mask2Former:train_net.py, mask2former/evaluation/instance_evaluation.py.
"""

import logging
import math
from dataclasses import replace

import numpy as np
import torch

from common.batch import Sample
from common.datasets.dataset import Dataset
from common.datasets.grammar import data_folder, find_files
from common.datasets.known import KNOWN
from common.datasets.names import load_dataset
from common.evaluation import evaluate_detections
from common.labels import Vocabulary
from common.masks import encode_masks
from common.tables import Scores

log = logging.getLogger("concord")


def instances_of(dataset: Dataset, data_root: str) -> Dataset | None:
    """Returns the instance annotations of a known panoptic dataset's images, as published.

    COCO's instances overlap, its panoptic segments do not, and the official AP is of the instances.
    Returns None if there are no such files, or if they are of other images or classes.
    data_root: as in `load_datasets`
    """
    known = KNOWN.get(dataset.name)
    if known is None or not known.instances:
        return None
    root = data_folder(data_root)
    for split in known.splits:
        files = find_files(dataset.name, split, root)
        if files is None or str(files[0]) != dataset.index.source:
            continue
        if find_files(known.instances, split, root) is None:
            return None
        instances = load_dataset(known.instances, split, None, root, check=False)
        same_images = set(instances.index.image_ids) == set(dataset.index.image_ids)
        if same_images and instances.vocabulary.ids == things_of(dataset).ids:
            return instances
    return None


def things_of(dataset: Dataset) -> Vocabulary:
    """Returns the things of a panoptic dataset's vocabulary."""
    vocabulary = dataset.vocabulary
    things = np.flatnonzero(vocabulary.is_thing).tolist()
    names = tuple(vocabulary.names[label] for label in things)
    ids = tuple(vocabulary.ids[label] for label in things)
    return Vocabulary(dataset.name, names, ids)


def thing_masks(truth: Sample, is_thing: tuple[bool, ...]) -> list[dict | None]:
    """Returns the RLE of each segment (rows of `truth.labels`) that is a thing, None for stuff."""
    masks: list[dict | None] = []
    for row, label in enumerate(truth.labels.tolist()):
        mask = encode_masks(truth.segments[None] == row)[0] if is_thing[label] else None
        masks.append(mask)
    return masks


def thing_results(dataset: Dataset, things: dict[int, tuple[dict, list]], data_root: str) -> Scores:
    """Returns {"AP things": COCO's mask AP}, {} for a dataset without things.

    Of each class of the dataset it gives the mask AP, NaN for stuff.

    things:    for each row its predicted instances of things, with `segmentations` and `size`, and
               its `thing_masks`, which are the truth where there are no `instances_of` the dataset
    data_root: as in `load_datasets`
    """
    is_thing = np.array(dataset.vocabulary.is_thing)
    if not is_thing.any():
        return Scores({}, {})
    new_label = np.cumsum(is_thing) - 1  # of each class among the things
    rows = range(len(dataset))
    truth = instances_of(dataset, data_root)
    if truth is None:
        truth = own_instances(dataset, new_label, things)
    else:
        row_of = {id: row for row, id in enumerate(dataset.index.image_ids)}
        rows = [row_of[id] for id in truth.index.image_ids]
    message = "%s: AP of things with the %d masks of %s"
    log.info(message, dataset.name, len(truth.index.labels), truth.index.source)
    predictions = {}
    for position, row in enumerate(rows):
        found, _ = things[row]
        labels = torch.from_numpy(new_label[found["labels"].numpy()])
        predictions[position] = found | {"labels": labels}
    scores = evaluate_detections(truth, predictions)
    column = np.full(len(is_thing), math.nan)
    column[is_thing] = scores.classes["mask AP"]
    return Scores({"AP things": scores["mask AP"]}, {"mask AP": column})


def own_instances(
    dataset: Dataset, new_label: np.ndarray, things: dict[int, tuple[dict, list]]
) -> Dataset:
    """Returns the thing segments of a panoptic dataset as instances, with their labels (C,) new."""
    every = [mask for row in range(len(dataset)) for mask in things[row][1]]
    sizes = np.array([things[row][0]["size"] for row in range(len(dataset))], dtype=np.int32)
    index = replace(dataset.index, segmentations=every, sizes=sizes)
    index = index.keep(np.array([mask is not None for mask in every], dtype=bool))
    index = replace(index, labels=new_label[index.labels].astype(np.int32))
    return replace(
        dataset, vocabulary=things_of(dataset), index=index, metric="coco", supervision="instances"
    )
